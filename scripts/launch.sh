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
LAUNCH=${LAUNCH:-$([ "$gpus" -gt 0 ] && echo zero3 || echo cpu)}
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}

# LAUNCH is one of cpu, ddp, zero2, zero3, or two of them joined, e.g. cpu+zero2
options=()
case "+$LAUNCH+" in *+cpu+*)
  # no mixed precision and no fork-heavy loading on a machine without GPUs
  options+=(--use_cpu true --bf16 false --tf32 false)
  export DS_ACCELERATOR=cpu
  ;;
esac
case "+$LAUNCH+" in
  *+zero2+*) options+=(--deepspeed configs/deepspeed/zero2.json) ;;
  *+zero3+*) options+=(--deepspeed configs/deepspeed/zero3.json) ;;
  *+cpu+* | *+ddp+*) ;;
  *)
    echo "LAUNCH is '$LAUNCH'; pass cpu, ddp, zero2 or zero3, or cpu+ddp, cpu+zero2, cpu+zero3" >&2
    exit 2
    ;;
esac

set -x
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
  -m "$module" --config "$config" "${options[@]}" "$@"
