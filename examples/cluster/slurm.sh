#!/bin/bash
#SBATCH --job-name=slimtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
# Checked with srun and scontrol stood in for, as tests/examples/test_cluster.py has it; not submitted.
# Two minutes before the time is over Slurm sends SIGTERM: the step is ended and saved.

set -euo pipefail
run=/SHARED/my-run

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE

if [ -f "$run/config.yaml" ]; then
    command="slimtune resume $run"
else
    command="slimtune train MODEL /SHARED/chats.jsonl -o $run"
fi

# shellcheck disable=SC2016 # srun's own shells know who they are
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec '"$command"
