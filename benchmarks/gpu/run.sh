#!/usr/bin/env bash
# What must be measured on a GPU, in stages of at most eight minutes each, the most valuable first.
#
#   bash benchmarks/gpu/run.sh [STAGE ...]        checks, speed, plan, learning, checkpoints; default: all
#   bash benchmarks/gpu/run.sh --dry              on a CPU, at tiny sizes, into a folder that is deleted
#
# Tables and pictures are written to docs/results/gpu/DEVICE after every step, or to OUT/DEVICE with --out OUT. The same
# command goes on with what is missing or has failed; --again makes what is done anew.
# Without a network: on a machine that has one, `bash benchmarks/gpu/bundle.sh FOLDER` collects wheels and text in files
# of under 64 MiB each; bring FOLDER along, and name it in RELORA_BUNDLE. A torch that is installed is used as it is.
#   PYTHON   default: .venv/bin/python of this repository if launch/setup.sh has made it, else python3
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd -- "$root"
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
if [[ -n ${RELORA_BUNDLE:-} ]]; then
    bundle=$(cd -- "$RELORA_BUNDLE" && pwd -P)
    site=${TMPDIR:-/tmp}/relora-bundle-$(id -u)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$bundle"/*.whl
    cat -- "$bundle"/text.* | tar --extract --gzip --directory "$site"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} RELORA_TEXT=$site/text
fi
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
    { printf 'run.sh: error: %s has no torch: run bash launch/setup.sh first, or name another in PYTHON\n' "$python" >&2; exit 2; }
# The first look at the GPU must not be the launcher's: each step is a fork of it, and CUDA does not survive a fork.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
exec "$python" -m benchmarks.gpu "$@"
