#!/usr/bin/env bash
# RLVR (R1-Omni): GRPO from the cold-start checkpoint on clips with labels.
#
#   MODEL_PATH  checkpoint to start from      (outputs/cold_start)
#   DATA        list of samples               (data/mafw_dfew_train.json)
#   DATA_FOLDER where clip paths start        (data)
#   OUTPUT      where the checkpoint goes     (outputs/grpo); a run that stopped goes on from there
#   CONFIG      recipe                        (configs/grpo.yaml; configs/release/grpo.yaml is the released one)
#   LAUNCH      cpu | ddp | zero2 | zero3     (zero3 with GPUs, else cpu; cpu+zero2 and the like join two)
#   NPROC       processes on this machine     (its GPUs, else 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT  for several machines, as torchrun has them
# Further options go to open_r1.grpo, e.g. --max_steps 10.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" open_r1.grpo "${CONFIG:-configs/grpo.yaml}" \
  --model_path "${MODEL_PATH:-outputs/cold_start}" --data "${DATA:-data/mafw_dfew_train.json}" \
  --data_folder "${DATA_FOLDER:-data}" --output_dir "${OUTPUT:-outputs/grpo}" "$@"
