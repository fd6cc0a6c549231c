#!/usr/bin/env bash
# Write the Python modules of serve_app/protos. Needs grpcio-tools of the lowest grpcio that is supported.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. serve_app/protos/*.proto
