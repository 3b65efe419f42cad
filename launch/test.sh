#!/usr/bin/env bash
# Run the tests in an environment of their own making.
#
#   bash launch/test.sh [arguments of pytest]      as in: bash launch/test.sh -x tests/end_to_end/test_configs.py
#                                                  (-n0: in one process, as --pdb and -s need it)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash launch/setup.sh deepspeed,plots,quantization,test
# A file's tests share what they made; two at once are enough for two cores, and four for what torch takes of memory.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
