#!/usr/bin/env bash
# Collect what benchmarks/gpu/run.sh needs on a machine without a network: wheels, and text to train on.
#
#   bash benchmarks/gpu/bundle.sh FOLDER [PACKAGE ...]
#
# PACKAGE: what is missing there, in the version that is installed here; without what it needs itself, so name that too.
# Default: all that relora needs but torch, which must be there. For another Python than 3.11: BUNDLE_PYTHON=3.12.
# FOLDER/text.* are pieces of one archive; no file is over 60 MiB but wheels that are.
#   BUNDLE_MEGABYTES   of text (default: 80, a fifth of it when packed)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
(($# > 0)) || { printf 'bundle.sh: error: no folder given: bash benchmarks/gpu/bundle.sh FOLDER [PACKAGE ...]\n' >&2; exit 2; }
mkdir -p -- "$1"
folder=$(cd -- "$1" && pwd -P)
shift
cd -- "$root"
[[ -x .venv/bin/python ]] || { printf 'bundle.sh: error: no .venv: run bash launch/setup.sh first\n' >&2; exit 2; }

# In the versions that are installed here. By default all that relora needs, torch and its own libraries left out.
mapfile -t packages < <(.venv/bin/python - "$@" <<'PY'
import re
import sys
from importlib.metadata import requires, version

pending, found = sys.argv[1:] or ["relora", "pytest", "peft", "hypothesis"], {}
while pending:
    name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
    if name in found or name == "torch" or name.startswith(("nvidia-", "triton")):
        continue
    found[name] = version(name)
    if len(sys.argv) == 1:
        pending += [re.match(r"[\w.-]+", need)[0] for need in requires(name) or [] if ";" not in need]
found.pop("relora", None)
print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
PY
)
((${#packages[@]} > 0)) || exit 1
platforms=(--platform any)
for glibc in 2_17 2_24 2_27 2_28 2_31 2_34 2_35; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
.venv/bin/python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${BUNDLE_PYTHON:-3.11}" "${platforms[@]}" -d "$folder" "${packages[@]}"

temporary=$(mktemp -d)
trap 'rm -r -- "$temporary"' EXIT
.venv/bin/python -m benchmarks.gpu.text "$temporary/text" --megabytes "${BUNDLE_MEGABYTES:-80}"
rm -f -- "$folder"/text.*
tar --create --gzip --directory "$temporary" text | split --bytes 60M - "$folder/text."
du -h -- "$folder"/*
