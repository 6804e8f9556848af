#!/usr/bin/env bash
# Usage: dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
# From the environment: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -e
TOOLS=$(cd "$(dirname "$0")" && pwd)

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
torchrun \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$TOOLS/test.py" "$1" "$2" --launcher pytorch "${@:4}"
