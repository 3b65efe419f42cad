#!/usr/bin/env bash
# Run the tests in an environment of their own making.
#
#   bash launch/test.sh [arguments of pytest]      as in: bash launch/test.sh -x tests/test_configs.py
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash launch/setup.sh deepspeed,plots,quantization,test
exec .venv/bin/python -m pytest "$@"
