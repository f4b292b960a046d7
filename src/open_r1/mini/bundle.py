"""Packs a trained miniature with its towers and a few held-out clips, as the repository carries it.

    python -m open_r1.mini.bundle OUTPUT/seed_0 assets/mini

The clips are, of each kind, the first one of a test list that the model answers right: they show how it works, and how
often it is right is told by the table in docs/miniature.md.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from humanomni.errors import CheckpointError, exit_status
from humanomni.loading import load_pretrained
from humanomni.prompts import EMOTION_QUESTION
from humanomni.tiny import whole_folder
from open_r1.metrics import parse_answer
from open_r1.mini.cues import KINDS
from open_r1.mini.results import Chain
from open_r1.mini.texts import conversation
from open_r1.mini.world import NOTE, read_scenes
from open_r1.prediction_files import write_json
from open_r1.run_record import git_state

MODEL = "R1-Omni"
SHOWN = [("mini_dfew", kind) for kind in KINDS] + [("mini_ravdess", "conflict")]


def bundle(chain: Path, output: Path) -> None:
    """Writes `output`: a checkpoint `R1-Omni-mini`, `clips/`, their list `clips.json`, and `made.json`.

    Raises:
        CheckpointError: `output` is there already.
    """
    if output.exists():
        raise CheckpointError(f"{output} is there already; remove it first")
    scenes = read_scenes(chain.parent / "world")
    answers = Chain(chain, scenes)
    with whole_folder(output) as draft:
        entries = []
        for dataset, kind in SHOWN:
            clip = next(
                (
                    prediction["video"]
                    for prediction in answers.run(MODEL, dataset).predictions
                    if scenes[prediction["video"]].kind == kind
                    and parse_answer(prediction["response"] or "") == prediction["label"]
                ),
                None,
            )
            if clip is None:
                raise CheckpointError(f"{chain} answers no {kind} clip of {dataset} right; train it longer")
            name = f"clips/{dataset.removeprefix('mini_')}_{kind}.mp4"
            (draft / "clips").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chain.parent / "world" / clip, draft / name)
            entries.append(conversation(EMOTION_QUESTION, "video_audio", scenes[clip].label, name))
        write_json(draft / "clips.json", entries)
        model, processor = load_pretrained(chain / MODEL, device="cpu", dtype="float32")
        folder = draft / f"{MODEL}-mini"
        model.save_pretrained(folder, save_towers=True)
        processor.save_pretrained(folder)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        commit = (git_state(Path(__file__).parent) or {}).get("revision", "")
        commands = [
            f"bash scripts/reproduce_mini.sh --seeds {chain.name.removeprefix('seed_')}",
            f"python -m open_r1.mini.bundle outputs/mini/{chain.name} assets/mini",
        ]
        write_json(draft / "made.json", {"note": NOTE, "commands": commands, "commit": commit})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m open_r1.mini.bundle", description=__doc__.splitlines()[0])
    parser.add_argument("chain", type=Path, help="a seed's folder of scripts/reproduce_mini.sh")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    options = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    return exit_status(lambda: bundle(options.chain, options.output))


if __name__ == "__main__":
    sys.exit(main())
