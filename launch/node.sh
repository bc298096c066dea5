#!/usr/bin/env bash
# One of several nodes; start it on each of them, with the same arguments and another NODE_RANK:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/node.sh 8 fit --config glue_sst2.yaml --config strategies/fsdp.yaml
# MASTER_ADDR is an address of the node with NODE_RANK 0 that all others reach. Where a node has several networks,
# GLOO_SOCKET_IFNAME (CPU) and NCCL_SOCKET_IFNAME (GPU) name the interface to use.
set -euo pipefail
processes=$1
shift
exec torchrun --nnodes "${NODES:?number of nodes}" --node_rank "${NODE_RANK:?0 to NODES-1}" \
    --nproc_per_node "$processes" --master_addr "${MASTER_ADDR:?address of node 0}" \
    --master_port "${MASTER_PORT:-29500}" -- \
    "$(dirname "$0")/../train.py" "$@" --trainer.devices "$processes" --trainer.num_nodes "$NODES"
