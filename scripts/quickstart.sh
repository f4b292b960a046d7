#!/usr/bin/env bash
# Installs the project, builds a tiny untrained checkpoint and asks it about the bundled clip; quick the second time.
# stdout is the model's text alone. VENV, PYTHON and EXTRAS are those of setup.sh; arguments go to inference.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup.sh >&2
case "${VENV:-.venv}" in
    none) python="${PYTHON:-python}" ;;
    *) python="${VENV:-.venv}/bin/python" ;;
esac
model=models/tiny-untrained
if [ ! -f "$model/untrained.json" ]; then
    "$python" -m humanomni.tiny "$model" >&2  # libraries may print
fi
cat >&2 <<NOTE
NOTE: $model has random weights. It takes the path of the real model, from clip to text, but it was never trained:
      the text below is noise.
NOTE
"$python" inference.py --modal video_audio --model_path "$model" --video_path assets/example.mp4 --max_new_tokens 32 "$@"
cat >&2 <<NOTE
NOTE: it works. For a real answer fetch the released weights and their towers (about 8 GB), then ask about your clip:
      bash scripts/download_models.sh
      $python inference.py --modal video_audio --model_path models/R1-Omni-0.5B --video_path your_clip.mp4
NOTE
