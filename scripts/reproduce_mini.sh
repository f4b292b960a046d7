#!/usr/bin/env bash
# The whole experiment in miniature, on a CPU: a drawn world, four models, and their table (docs/miniature.md).
#
#   bash scripts/reproduce_mini.sh             one seed, 2 cores: 42 minutes
#   bash scripts/reproduce_mini.sh --smoke     a few steps of everything, to try the code: about 3 minutes
#
#   --output DIR     where all of it goes (outputs/mini, or outputs/mini_smoke)
#   --seeds "0 1 2"  full chains to run, towers included, for a mean and a spread ("0")
#   --control "0"    seeds of which cold start and RLVR are also run with an unbiased writer (none)
# Stages that have finished are skipped, one that was interrupted goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke= output= seeds=0 control=
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) smoke=1 ;;
    --output | --seeds | --control)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift
      ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
output=${output:-outputs/mini${smoke:+_smoke}}
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export LAUNCH=cpu DATA_FOLDER=$output/world
world=$output/world

scale=full epochs="1 2 3"
towers=() few=() rollouts=() answers=(--max_new_tokens 96)
if [ -n "$smoke" ]; then
  scale=smoke epochs=1
  towers=(--sound_steps 8 --picture_steps 8) few=(--max_steps 3)
  rollouts=(--max_steps 2 --max_completion_length 24) answers=(--max_new_tokens 24)
fi

# stage NAME COMMAND...: runs the command unless it has already ended well
stage() {
  local mark=$output/finished/$1
  shift
  if [ -e "$mark" ]; then
    echo "== ${mark#"$output"/finished/} is done" >&2
    return
  fi
  echo "== ${mark#"$output"/finished/}" >&2
  local start=$SECONDS
  "$@"
  mkdir -p "$(dirname "$mark")"
  echo "$((SECONDS - start)) seconds" >"$mark"
}

# train SCRIPT RECIPE FROM TO LIST [options]
train() {
  local script=$1 recipe=$2 from=$3 to=$4 list=$5
  shift 5
  CONFIG=configs/mini/$recipe.yaml MODEL_PATH=$from DATA=$world/$list OUTPUT=$to \
    bash "scripts/$script.sh" --feature_cache "$cache" --seed $((42 + seed)) "$@"
}

# evaluate OUTPUT THINK SUFFIX MODEL...: on the three test sets, or on one of their modalities
evaluate() {
  local folder=$1 think=$2 suffix=$3
  shift 3
  "$PYTHON" -m open_r1.evaluate --config configs/mini/evaluate.yaml --model_path "$@" --think "$think" \
    --output_dir "$folder" --feature_cache "$cache" --data_folder "$world" "${answers[@]}" --data \
    "mini_dfew=$world/dfew_test$suffix.json" "mini_mafw=$world/mafw_test$suffix.json" \
    "mini_ravdess=$world/ravdess_test$suffix.json"
}

stage world "$PYTHON" -m open_r1.mini.world "$world" --scale "$scale"
for seed in $seeds; do
  chain=$output/seed_$seed cache=$output/seed_$seed/features
  start=$chain/untrained base=$chain/HumanOmni cold=$chain/EMER-SFT label=$chain/MAFW-DFEW-SFT
  stage "seed_$seed/towers" "$PYTHON" -m open_r1.mini.checkpoint "$world" "$start" --seed "$seed" "${towers[@]}"
  stage "seed_$seed/features" "$PYTHON" -m open_r1.cache_features --model_path "$start" --data "$world/all.yaml" \
    --data_folder "$world" --out "$cache" --batch_size 64 --shard_size 512
  stage "seed_$seed/base" train train_sft base "$start" "$base" base.json "${few[@]}"
  stage "seed_$seed/cold_start" train train_cold_start cold_start "$base" "$cold" cold_start.json "${few[@]}"
  labels=()
  for count in $epochs; do
    stage "seed_$seed/sft_$count" train train_sft sft "$base" "$label-$count" train.yaml \
      --num_train_epochs "$count" "${few[@]}"
    labels+=("$label-$count")
  done
  stage "seed_$seed/grpo" train train_grpo grpo "$cold" "$chain/R1-Omni" train.yaml "${rollouts[@]}"
  explained=("$cold" "$chain/R1-Omni")
  if [[ " $control " == *" $seed "* ]]; then
    stage "seed_$seed/cold_start_unbiased" train train_cold_start cold_start "$base" "$cold-unbiased" \
      cold_start_unbiased.json "${few[@]}"
    stage "seed_$seed/grpo_unbiased" train train_grpo grpo "$cold-unbiased" "$chain/R1-Omni-unbiased" train.yaml \
      "${rollouts[@]}"
    explained+=("$cold-unbiased" "$chain/R1-Omni-unbiased")
  fi
  stage "seed_$seed/evaluate_labels" evaluate "$chain/evaluation" false "" "$base" "${labels[@]}"
  stage "seed_$seed/evaluate_reasoning" evaluate "$chain/evaluation" true "" "${explained[@]}"
  for modal in video audio; do
    stage "seed_$seed/evaluate_$modal" evaluate "$chain/evaluation_$modal" true "_$modal" "$chain/R1-Omni"
  done
done
"$PYTHON" -m open_r1.mini.results "$output"
