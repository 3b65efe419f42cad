#!/usr/bin/env bash
# Train on a Slurm cluster: one launcher a node, one process a GPU.
#
#   bash launch/setup.sh                                     once, on a disk that all nodes see
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh configs/llama_1b.yaml [section.key=value ...]
#
# Run it from the root of the repository. A job that is preempted is queued again under the same number, and goes on
# from its last checkpoint; so does a job that is sent again with the same line. Partition, account and the like:
# options of sbatch.
#SBATCH --job-name=relora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

fail() { printf 'slurm: error: %s\n' "$*" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: start it with sbatch launch/slurm.sh configs/NAME.yaml"
(($# > 0)) || fail "no config given: sbatch launch/slurm.sh configs/NAME.yaml"
# Slurm runs a copy of this file from its own folder, so the repository is where sbatch was called.
cd -- "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/torchrun_multinode.sh ]] || fail "$PWD is not the root of the repository: call sbatch there"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}   # jobs that share a node get different ports
export NNODES=$SLURM_JOB_NUM_NODES
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# SLURM_NODEID differs from node to node, so the inner shell reads it.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 \
    bash -c 'export NODE_RANK=$SLURM_NODEID; exec bash launch/torchrun_multinode.sh "$@"' relora "$@"
