#!/usr/bin/env bash
# Installs the project and asks the bundled miniature about a bundled clip, offline, on a CPU; quick the second time.
# stdout is the model's text alone. VENV, PYTHON and EXTRAS are those of setup.sh; arguments go to inference.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup.sh >&2
case "${VENV:-.venv}" in
    none) python="${PYTHON:-python}" ;;
    *) python="${VENV:-.venv}/bin/python" ;;
esac
cat >&2 <<NOTE
NOTE: assets/mini/R1-Omni-mini is a miniature for trying the code, trained on drawn faces and synthetic voices
      (docs/miniature.md). It is no judge of people's feelings, and of your own clips it knows nothing.
NOTE
"$python" inference.py --modal video_audio --model_path assets/mini/R1-Omni-mini \
    --video_path assets/mini/clips/dfew_sound.mp4 --max_new_tokens 96 "$@"
cat >&2 <<NOTE
NOTE: it works. For a real answer fetch the released weights and their towers (about 8 GB), then ask about your clip:
      bash scripts/download_models.sh
      $python inference.py --modal video_audio --model_path models/R1-Omni-0.5B --video_path your_clip.mp4
NOTE
