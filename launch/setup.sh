#!/usr/bin/env bash
# Make .venv at the root of the repository, and install relora there with the versions of launch/constraints.txt.
#
#   bash launch/setup.sh [EXTRAS]          EXTRAS: extras of pyproject.toml, as in plots,test,dev
#
# When nothing has changed since the last time it returns in well under a second, without the network.
#   RELORA_PYTHON        the Python to build on (3.11 or newer); default: python3.11, else python3
#   RELORA_TORCH_INDEX   address of the package index to take torch from: one for each CPU, CUDA or ROCm build, see
#                        PyTorch's installation page; default: the index that pip uses for everything
#   RELORA_ONLY_DEPENDENCIES=1   install what relora needs, without relora itself: needs only pyproject.toml and
#                        launch/, so that an image's layer of packages outlives changes of the code
# Without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER take all packages from a folder of wheels (docs/cluster.md).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
wanted=${1:-}
index=${RELORA_TORCH_INDEX:-}
venv=$root/.venv
python=$venv/bin/python
constraints=launch/constraints.txt
stamp=$venv/relora-setup   # five lines: key, root, index, extras, torch build; there only after a complete installation
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# Whether RELORA_PYTHON names another Python than the one that .venv was built on.
other_python() {
    local who='import sys; print(sys.version, sys.base_prefix)'
    [[ -n ${RELORA_PYTHON:-} ]] && [[ $("$RELORA_PYTHON" -c "$who") != "$("$python" -c "$who")" ]]
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# sha256 of everything that determines the installation, except the extras.
key_of_installation() {
    "$python" - "$index" pyproject.toml "$constraints" <<'PY'
import hashlib, pathlib, sys
parts = [sys.argv[1].encode(), *(pathlib.Path(path).read_bytes() for path in sys.argv[2:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

find_python() {
    local candidate
    if [[ -n ${RELORA_PYTHON:-} ]]; then
        new_enough "$RELORA_PYTHON" || fail "RELORA_PYTHON=$RELORA_PYTHON is not a Python 3.11 or newer"
        printf '%s\n' "$RELORA_PYTHON"
        return
    fi
    for candidate in python3.11 python3; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (tried python3.11, python3): install one, or name it in RELORA_PYTHON"
}

make_venv() {
    local base
    base=$(find_python)
    "$base" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$base cannot create virtual environments: install its venv module" \
            "(Debian and Ubuntu: apt install python3-venv)"
    say "creating .venv with $("$base" --version)"
    "$base" -m venv --clear -- "$venv"
}

# "plots,test" "test,dev" -> "dev,plots,test"
union() { tr ',' '\n' <<<"$1,$2" | sed '/^ *$/d' | sort -u | paste -sd, -; }

# What relora and these extras need, one requirement a line.
requirements() {
    "$python" - "$1" <<'PY'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
names = [name.strip() for name in sys.argv[1].split(",") if name.strip()]
unknown = [name for name in names if name not in extras]
if unknown:
    sys.exit(f"setup: error: no such extra: {', '.join(unknown)}; there are {', '.join(extras)}")
print(*project["dependencies"], *(need for name in names for need in extras[name]), sep="\n")
PY
}

# Quiet in a log, with pip's progress on a terminal.
pip_install() {
    if [[ -t 1 ]]; then "$python" -m pip install "$@"; else "$python" -m pip install --quiet "$@"; fi
}

read_stamp() {
    old_key='' old_root='' old_index='' old_extras='' old_torch=''
    [[ -f $stamp ]] || return 0
    local name
    for name in old_key old_root old_index old_extras old_torch; do
        IFS= read -r "$name" || break
    done <"$stamp"
}

read_stamp
if [[ -e $venv ]] && ! new_enough "$python"; then
    say "the .venv here does not work: recreating it"
    make_venv
elif [[ -n $old_root && $old_root != "$root" ]]; then
    say "the .venv here was made for $old_root: recreating it"
    make_venv
elif [[ -e $venv ]] && other_python; then
    say "RELORA_PYTHON=$RELORA_PYTHON is another Python than that of .venv: recreating it"
    make_venv
elif [[ ! -e $venv ]]; then
    make_venv
fi
read_stamp

key=$(key_of_installation)
requirements "$wanted" >/dev/null   # an extra that does not exist is only a warning to pip
extras=$(union "$wanted" "$old_extras")   # installed extras stay: scripts with different extras do not undo each other
if [[ $key == "$old_key" && $extras == "$old_extras" ]]; then
    say "ready: $old_torch"
    exit 0
fi

torch=$(grep -m1 '^torch==' "$constraints") || fail "$constraints does not pin torch"
from=${index:-the default package index (RELORA_TORCH_INDEX names another)}
if [[ -n ${PIP_NO_INDEX:-} ]]; then from="${PIP_FIND_LINKS:-nowhere: PIP_NO_INDEX is set, but not PIP_FIND_LINKS}"; fi
say "installing $torch from $from"
rm -f -- "$stamp"
if [[ $index != "$old_index" ]]; then   # the same version from another index would count as installed
    "$python" -m pip uninstall --quiet --yes torch >/dev/null 2>&1
fi
if [[ -n $index ]]; then pip_install --index-url "$index" "$torch"; else pip_install "$torch"; fi

if [[ -n ${RELORA_ONLY_DEPENDENCIES:-} ]]; then
    say "installing what relora needs${extras:+ with the extras $extras}"
    requirements "$extras" | pip_install --constraint "$constraints" --requirement /dev/stdin
    key=dependencies   # relora itself is still to be installed
else
    say "installing relora${extras:+ with the extras $extras}"
    pip_install --constraint "$constraints" -e ".${extras:+[$extras]}"
fi

got=$("$python" - <<'PY'
import torch
cuda, hip = torch.version.cuda, torch.version.hip
print("torch", torch.__version__, "for", f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "the CPU")
PY
)
printf '%s\n' "$key" "$root" "$index" "$extras" "$got" >"$stamp.new"
mv -- "$stamp.new" "$stamp"
say "got $got"
