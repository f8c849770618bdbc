#!/bin/sh
# Writes the Python code of protos/ below the folder $1, as the package vllm_sloguard.wire.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$1"
PATH="$PWD/.venv-proto/bin:$PATH" .venv-proto/bin/python -m grpc_tools.protoc \
    -Ivllm_sloguard/wire=protos/sloguard/v1 \
    --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" --mypy_grpc_out="quiet:$1" \
    vllm_sloguard/wire/telemetry.proto vllm_sloguard/wire/control.proto vllm_sloguard/wire/live.proto \
    vllm_sloguard/wire/agent.proto vllm_sloguard/wire/environment.proto
