#!/usr/bin/env bash
# Evaluates checkpoints on labelled sets: WAR, UAR, figures and a report (docs/evaluation.md).
#
#   MODEL_PATH  checkpoints, blanks between them     (models/R1-Omni-0.5B)
#   DATA        sets as NAME[:FOLD]=LIST, likewise   (dfew:1=lists/dfew1/test.json)
#   DATA_FOLDER where clip paths start               (data)
#   OUTPUT      where the results go                 (outputs/evaluation); a run that stopped goes on from there
#   CONFIG      settings                             (configs/evaluate.yaml)
#   NPROC       processes on this machine            (its GPUs, else 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT         for several machines with a shared disk, as torchrun has them
# Further options go to open_r1.evaluate, e.g. --think false.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
gpus=$( (command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null || true) | wc -l)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
read -ra models <<<"${MODEL_PATH:-models/R1-Omni-0.5B}"
read -ra sets <<<"${DATA:-dfew:1=lists/dfew1/test.json}"

launch=(-m)
if [ "$NNODES" -gt 1 ] || [ "$NPROC" -gt 1 ]; then
  launch=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m)
fi
exec "$PYTHON" "${launch[@]}" open_r1.evaluate --config "${CONFIG:-configs/evaluate.yaml}" \
  --model_path "${models[@]}" --data "${sets[@]}" --data_folder "${DATA_FOLDER:-data}" \
  --output_dir "${OUTPUT:-outputs/evaluation}" "$@"
