#!/usr/bin/env bash
# Train on several machines: run the same line on each, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NPROC_PER_NODE=8 \
#       bash launch/torchrun_multinode.sh configs/llama_1b.yaml [section.key=value ...]
#
#   NNODES           number of machines; with RDZV=c10d also MIN:MAX
#   NODE_RANK        0 on the machine at MASTER_ADDR, 1, 2, ... on the others (not with RDZV=c10d)
#   MASTER_ADDR      address of one of the machines, reachable from all
#   MASTER_PORT      a free port there
#   NPROC_PER_NODE   processes a machine: its number of GPUs
#   RDZV             static (default): the set of machines is fixed. c10d: elastic, a machine may leave and come back;
#                    the processes then restart, and the run resumes from its last checkpoint
#   RDZV_ID          c10d: a name of the job, the same everywhere (default: relora)
#   MAX_RESTARTS     c10d: how often the processes may be restarted (default: 3)
#   SHUTDOWN_TIMEOUT seconds that processes have after a signal, for a checkpoint (default: 240)
#   LOG_DIR          folder in which each process also gets files for its output, in a folder for each machine; in the
#                    terminal each line then begins with the number of its process. If the run hangs, its watchdog adds
#                    flight_record_N of process N, for `torchfrtrace LOG_DIR -p flight_record_` (default: none)
#   NCCL_DEBUG       what NCCL prints: WARN (default), its errors; INFO, also how it connects
#   PYTHON           default: .venv/bin/python of this repository if launch/setup.sh has made it, else python3
#
# All machines need the same code, packages and config; an output_dir on a disk that all see lets any of them resume.
# SIGTERM, SIGINT and SIGUSR1 are passed on to the processes: the run then writes a checkpoint and ends, with 143.
# Of a failure the last lines name the process that failed first and its error; the exit code is that of this process.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
rdzv=${RDZV:-static}

problems=()
need() { [[ -n ${!1:-} ]] || problems+=("$1 is not set: $2"); }
number() { [[ -z ${!1:-} || ${!1} =~ ^[0-9]+$ ]] || problems+=("$1=${!1} is not a number"); }

need NNODES "the number of machines"
need MASTER_ADDR "the address of one machine, the same on all"
need MASTER_PORT "a free port on MASTER_ADDR, the same on all"
need NPROC_PER_NODE "the number of processes on this machine, usually its number of GPUs"
number MASTER_PORT
number NPROC_PER_NODE
number SHUTDOWN_TIMEOUT
case $rdzv in
    static)
        need NODE_RANK "0 on the machine at MASTER_ADDR, 1, 2, ... on the others"
        number NNODES
        number NODE_RANK
        if [[ ${NNODES:-} =~ ^[0-9]+$ && ${NODE_RANK:-} =~ ^[0-9]+$ ]] && ((NODE_RANK >= NNODES)); then
            problems+=("NODE_RANK=$NODE_RANK must be smaller than NNODES=$NNODES")
        fi
        ;;
    c10d)
        [[ -z ${NNODES:-} || $NNODES =~ ^[0-9]+(:[0-9]+)?$ ]] ||
            problems+=("NNODES=$NNODES is neither a number nor MIN:MAX")
        number MAX_RESTARTS
        ;;
    *) problems+=("RDZV=$rdzv must be static or c10d") ;;
esac
(($# > 0)) || problems+=("no config given: bash launch/torchrun_multinode.sh configs/NAME.yaml")

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' >/dev/null 2>&1 ||
    problems+=("$python has no torch: run bash launch/setup.sh first, or name another Python in PYTHON")

if ((${#problems[@]} > 0)); then
    printf 'torchrun_multinode: error: %s\n' "${problems[@]}" >&2
    exit 2
fi

options=(--nnodes "$NNODES" --nproc_per_node "$NPROC_PER_NODE")
if [[ $rdzv == c10d ]]; then
    options+=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "${RDZV_ID:-relora}")
    options+=(--max_restarts "${MAX_RESTARTS:-3}")
    # Otherwise a launcher that has survived a restart does not publish the address of its store to one that rejoins,
    # and both give up after a minute (torch 2.13, dynamic_rendezvous.py, next_rendezvous).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
    options+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
fi
# Slurm signals only the processes that it has started, that is the launcher, which must pass the signal on. By default
# torchrun does not pass on SIGUSR1, and kills its processes after 30 seconds.
# The training processes read this variable too, to know how much time a checkpoint has.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-240}
options+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
if [[ -n ${LOG_DIR:-} ]]; then
    options+=(--log-dir "$LOG_DIR/$(uname -n)" --tee 3)
    # shellcheck disable=SC2016  # torchrun fills in the rank
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[${rank}]: '}
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOG_DIR/flight_record_}
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
trap '' USR1   # the signal must not kill torchrun while it loads or waits for the other machines
exec "$python" launch/torchrun.py "${options[@]}" -m relora train "$@"
