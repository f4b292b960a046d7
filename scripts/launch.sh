#!/usr/bin/env bash
# Shared by the training scripts: starts one entry point on a CPU, one GPU, many GPUs or many machines.
# usage: launch.sh MODULE CONFIG [options of the module]; settings come from the environment (see scripts/train_*.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
module=$1 config=$2
shift 2

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
gpus=$( (command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null || true) | wc -l)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
if [ -z "${LAUNCH:-}" ]; then
  # one process has nobody to share weights with
  LAUNCH=$([ "$gpus" -eq 0 ] && echo cpu || { [ $((NPROC * NNODES)) -gt 1 ] && echo zero3 || echo ddp; })
fi

options=()
case "$LAUNCH" in
  cpu | ddp | cpu+ddp) ;;
  zero2 | cpu+zero2) options+=(--deepspeed configs/deepspeed/zero2.json) ;;
  zero3 | cpu+zero3) options+=(--deepspeed configs/deepspeed/zero3.json) ;;
  *)
    echo "error: LAUNCH is '$LAUNCH'; pass cpu, ddp, zero2 or zero3, or cpu+ddp, cpu+zero2, cpu+zero3" >&2
    exit 2
    ;;
esac
case "$LAUNCH" in cpu*)
  options+=(--use_cpu true --bf16 false --tf32 false)
  export DS_ACCELERATOR=cpu
  ;;
esac

launcher=("$PYTHON")
if [ $((NPROC * NNODES)) -gt 1 ] || [[ "$LAUNCH" == *zero* ]]; then
  launcher+=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
fi
set -x
exec "${launcher[@]}" -m "$module" --config "$config" "${options[@]}" "$@"
