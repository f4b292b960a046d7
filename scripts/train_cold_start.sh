#!/usr/bin/env bash
# Cold start (EMER-SFT): fine-tunes HumanOmni-0.5B on samples that explain their answer.
#
#   MODEL_PATH  checkpoint to start from      (models/HumanOmni-0.5B)
#   DATA        list of samples               (data/cold_start.json)
#   DATA_FOLDER where clip paths start        (data)
#   OUTPUT      where the checkpoint goes     (outputs/cold_start); a run that stopped goes on from there
#   CONFIG      recipe                        (configs/cold_start.yaml; configs/release/cold_start.yaml is the released one)
#   LAUNCH      cpu | ddp | zero2 | zero3     (zero3 with GPUs, else cpu; cpu+zero2 and the like join two)
#   NPROC       processes on this machine     (its GPUs, else 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT  for several machines, as torchrun has them
# Further options go to open_r1.sft, e.g. --max_steps 10.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" open_r1.sft "${CONFIG:-configs/cold_start.yaml}" \
  --model_path "${MODEL_PATH:-models/HumanOmni-0.5B}" --data "${DATA:-data/cold_start.json}" --data_folder "${DATA_FOLDER:-data}" \
  --output_dir "${OUTPUT:-outputs/cold_start}" "$@"
