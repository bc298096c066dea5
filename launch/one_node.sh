#!/usr/bin/env bash
# Several processes on this machine:
#   launch/one_node.sh 8 fit --config glue_sst2.yaml --config strategies/fsdp.yaml
set -euo pipefail
processes=$1
shift
exec torchrun --standalone --nproc_per_node "$processes" -- \
    "$(dirname "$0")/../train.py" "$@" --trainer.devices "$processes"
