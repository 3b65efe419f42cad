#!/usr/bin/env bash
# Run the tests in .venv, created or updated first.
#
#   bash launch/test.sh [arguments of pytest]      as in: bash launch/test.sh -x tests/end_to_end/test_configs.py
#                                                  (-n0: in one process, which --pdb and -s need)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash launch/setup.sh deepspeed,plots,quantization,test
# The tests of a file share fixtures, so a file stays in one process; more than four take too much memory for torch.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
