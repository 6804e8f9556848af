#!/usr/bin/env bash
# Usage: slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]
# From the environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS.
set -ex
TOOLS=$(cd "$(dirname "$0")" && pwd)

# shellcheck disable=SC2086  SRUN_ARGS holds several words
PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
srun -p "$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-4}" \
    --ntasks="${GPUS:-4}" \
    --ntasks-per-node="${GPUS_PER_NODE:-4}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    $SRUN_ARGS \
    python -u "$TOOLS/train.py" "$3" --launcher slurm "${@:4}"
