#!/usr/bin/env bash
# Train on a Slurm cluster: one launcher a node, one process a GPU.
#
#   bash launch/setup.sh                                     once, on a disk that all nodes see
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh configs/llama_1b.yaml [section.key=value ...]
#
# Run it from the root of the repository. Five minutes before its time limit, and when it is preempted, a job writes a
# checkpoint, ends, requeues itself under the same number and resumes from there. So does a job that is submitted again
# with the same line. scancel --signal=USR1 JOB triggers this at any time. `touch RUN/STOP` ends a job with a checkpoint
# and without a requeue; scancel JOB cancels it for good.
# Where preempted jobs get no grace time, training.save_steps bounds the work that is lost. Partition, account, CPUs and
# memory are options of sbatch: many clusters give a task one CPU unless --cpus-per-task or --exclusive asks for more.
# A run that fails is not requeued.
#
#   output      slurm-JOB.out, each line with the number of its node and of its process; slurm-JOB/ has files for each
#               process (LOG_DIR=FOLDER: elsewhere)
#   arrays      sbatch --array=0-3 launch/slurm.sh configs/llama_60m.yaml seed=%a output_dir=runs/seed_%a
#               %a in an argument is the number of the task
#   container   CONTAINER="apptainer exec --nv --bind $PWD relora.sif" PYTHON=/relora/.venv/bin/python sbatch ...
#               with the image of launch/Dockerfile; the code is that of this folder
#   variables   MAX_REQUEUES (default 100), and those of launch/torchrun_multinode.sh
#SBATCH --job-name=relora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
# Without the prefix B the signal goes to the launchers that srun has started, not to this shell. The shell must outlive
# them to requeue the job, even if it receives the signal too.
trap '' USR1

fail() { printf 'slurm: error: %s\n' "$*" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: start it with sbatch launch/slurm.sh configs/NAME.yaml"
(($# > 0)) || fail "no config given: sbatch launch/slurm.sh configs/NAME.yaml"
# Slurm runs a copy of this file from its own folder, so the repository is where sbatch was called.
cd -- "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/torchrun_multinode.sh ]] || fail "$PWD is not the root of the repository: call sbatch there"

set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
read -ra container <<<"${CONTAINER:-}"
export LOG_DIR=${LOG_DIR-slurm-$SLURM_JOB_ID}
# srun does not take this over from sbatch (since Slurm 22.05): the launcher and all its processes would share one CPU.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}   # jobs that share a node get different ports
export NNODES=$SLURM_JOB_NUM_NODES
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# output_dir as relora itself reads it: from the file, or from an override.
run_folder() {
    local python=${PYTHON:-.venv/bin/python}
    if ((${#container[@]} == 0)) && ! command -v "$python" >/dev/null; then python=python3; fi
    "${container[@]}" "$python" - "$@" 2>/dev/null <<'PY'
import sys

from relora.config.load import load_config

config, *overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
print(load_config(config, overrides).output_dir)
PY
}

if ! run=$(run_folder "$@"); then
    printf 'slurm: warning: %s\n' "no output_dir found in: $*; this job will not queue itself again" >&2
    run=/nowhere
fi
# Nodes may end with different codes. The reason is in status.json, which is a new file each time it is written.
written() { stat -c '%i %y' -- "$run/status.json" 2>/dev/null || true; }
before=$(written)

code=0
# When one node ends, the others are ended too, but not at once: they may still be writing the last checkpoint.
# SLURM_NODEID differs from node to node, so the inner shell reads it. After `sbatch --export=NONE` srun would pass on
# none of the variables above.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=60 --label --export=ALL \
    bash -c 'export NODE_RANK=$SLURM_NODEID; exec "$@"' relora \
    "${container[@]}" bash launch/torchrun_multinode.sh "$@" || code=$?

# An old "preempted" says nothing about a job that failed before it wrote its own status: it would be requeued forever.
# One that was stopped by the file STOP is wanted no longer.
if ((code != 0)) && [[ $(written) != "$before" ]] && grep -q '"status": *"preempted"' "$run/status.json" &&
    ! grep -q '"reason": *"found [^"]*STOP' "$run/status.json"; then
    # Preempted before the first checkpoint it may come to nothing each time, as under a time limit of minutes.
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        printf 'slurm: error: the checkpoint is written, but job %s has been requeued %s times (MAX_REQUEUES)\n' \
            "$SLURM_JOB_ID" "$SLURM_RESTART_COUNT" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        printf 'slurm: the checkpoint is written; job %s is requeued\n' "$SLURM_JOB_ID"
    else
        printf 'slurm: error: the checkpoint is written, but job %s could not be requeued\n' "$SLURM_JOB_ID" >&2
    fi
fi
exit "$code"
