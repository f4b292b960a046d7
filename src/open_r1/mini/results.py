"""Gathers what scripts/reproduce_mini.sh measured into one table and one report.

    python -m open_r1.mini.results OUTPUT

OUTPUT holds `world/` and a `seed_N/` for each full chain. Writes `results.md`, `results.json` and `report/report.html`
there, and prints the tables. All figures are of final checkpoints on the test lists, greedy, in per cent.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from humanomni.errors import HumanOmniError, exit_status
from open_r1.metrics import parse_answer
from open_r1.mini.cues import KINDS, PICTURE_CUES, SOUND_CUES, Scene, best_answer
from open_r1.mini.texts import heard, seen
from open_r1.mini.world import NOTE, SPLITS, read_scenes
from open_r1.prediction_files import write_json, write_whole
from open_r1.report import PUBLISHED, Run, html_image, html_table, write_report

SETS = {"mini_dfew": "dfew_test", "mini_mafw": "mafw_test", "mini_ravdess": "ravdess_test"}
IN_DISTRIBUTION = ("mini_dfew", "mini_mafw")
OUT_OF_DISTRIBUTION = ("mini_ravdess",)
# folder of a model -> its row's name and the published row beside it
MODELS = {
    "HumanOmni": ("base (HumanOmni)", "HumanOmni-0.5B"),
    "EMER-SFT": ("cold start (EMER-SFT)", "EMER-SFT"),
    "MAFW-DFEW-SFT-1": ("label-only SFT, 1 epoch (MAFW-DFEW-SFT)", "MAFW-DFEW-SFT"),
    "MAFW-DFEW-SFT-2": ("label-only SFT, 2 epochs", None),
    "MAFW-DFEW-SFT-3": ("label-only SFT, 3 epochs", None),
    "R1-Omni": ("RLVR (R1-Omni)", "R1-Omni"),
    "EMER-SFT-unbiased": ("control: cold start, unbiased writer", None),
    "R1-Omni-unbiased": ("control: RLVR from it", None),
}
LAST_STEPS = 20  # of RLVR, whose sampled completions tell the share of well-formed ones
CUE_WORDS = {word for words in (*PICTURE_CUES.values(), *SOUND_CUES.values()) for word in words}


class Chain:
    """One full chain, from the towers to RLVR: what its models answered to the test lists."""

    def __init__(self, folder: Path, scenes: dict[str, Scene]):
        self.folder, self.scenes = folder, scenes
        self.models = [name for name in MODELS if (folder / "evaluation" / name).is_dir()]
        self._runs: dict[tuple[str, str, str], Run] = {}  # many figures are taken from each

    def run(self, model: str, dataset: str, evaluation: str = "evaluation") -> Run:
        key = (model, dataset, evaluation)
        if key not in self._runs:
            self._runs[key] = self._read(*key)
        return self._runs[key]

    def _read(self, model: str, dataset: str, evaluation: str) -> Run:
        folder = self.folder / evaluation / model / dataset
        try:
            metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
            lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
        except OSError as error:
            raise HumanOmniError(f"{folder} is not evaluated yet ({error.strerror}); finish the chain") from error
        return Run(MODELS[model][0], dataset, metrics, [json.loads(line) for line in lines])

    def score(self, model: str, dataset: str, name: str, reading: str = "strict") -> float:
        return self.run(model, dataset).metrics[reading][name]

    def format_rate(self, model: str) -> float:
        return statistics.fmean(self.run(model, dataset).metrics["format_rate"] for dataset in SETS)

    def accuracy(self, model: str, datasets: Sequence[str], kind: str, evaluation: str = "evaluation") -> float:
        """Share of right answers on the clips of one kind."""
        answers = [
            prediction
            for dataset in datasets
            for prediction in self.run(model, dataset, evaluation).predictions
            if self.scenes[prediction["video"]].kind == kind
        ]
        right = sum(parse_answer(answer["response"] or "") == answer["label"] for answer in answers)
        return 100 * right / max(len(answers), 1)

    def cues_named(self, model: str, datasets: Sequence[str]) -> float:
        """Share of the cues that a model's reasoning names right."""
        named = [
            cues_right(prediction["response"] or "", self.scenes[prediction["video"]])
            for dataset in datasets
            for prediction in self.run(model, dataset).predictions
        ]
        return 100 * statistics.fmean(named) / (len(PICTURE_CUES) + len(SOUND_CUES))

    def sampled_format(self, model: str) -> float:
        """Share of well-formed completions among those sampled in the last steps of RLVR."""
        history = json.loads((self.folder / model / "trainer_state.json").read_text("utf-8"))["log_history"]
        rates = [entry["rewards/format_reward/mean"] for entry in history if "rewards/format_reward/mean" in entry]
        return 100 * statistics.fmean(rates[-LAST_STEPS:])


def cues_right(response: str, scene: Scene) -> int:
    """How many of the scene's ten cues the reasoning names right, each in its place in the sentence."""
    told = [re.findall(r"[a-z]+", text) for text in response.split("In the ")]
    right = 0
    for truth in (seen(scene), heard(scene)):
        words = re.findall(r"[a-z]+", truth.removeprefix("In the "))
        said = next((part for part in told if part[:1] == words[:1]), [])
        pairs = zip(words, said, strict=False)
        right += sum(word == other for word, other in pairs if word in CUE_WORDS)
    return right


def ceiling(scenes: dict[str, Scene], dataset: str) -> tuple[float, float]:
    """WAR and UAR of the best possible answers, given the true cues of the very clips of the test list."""
    split = SETS[dataset]
    clips = [scene for scene in scenes.values() if scene.split == split]
    right = {label: [] for label in sorted({scene.label for scene in clips})}
    for scene in clips:
        right[scene.label].append(best_answer(scene, SPLITS[split].population) == scene.label)
    recalls = [statistics.fmean(hits) for hits in right.values()]
    return 100 * sum(map(sum, right.values())) / len(clips), 100 * statistics.fmean(recalls)


def majority(scenes: dict[str, Scene], datasets: Sequence[str], kind: str) -> float:
    """Accuracy of always answering the most frequent label of the clips of one kind."""
    labels = [
        scene.label for scene in scenes.values() if scene.split in map(SETS.get, datasets) and scene.kind == kind
    ]
    return 100 * max(map(labels.count, labels), default=0) / max(len(labels), 1)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def tables(chains: list[Chain], scenes: dict[str, Scene]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> head and rows."""
    models = [model for model in MODELS if any(model in chain.models for chain in chains)]
    worlds = {"in": IN_DISTRIBUTION, "out": OUT_OF_DISTRIBUTION}

    def over_seeds(figure: Callable, model: str, *details) -> str:
        return spread([figure(chain, model, *details) for chain in chains if model in chain.models])

    def scores(model: str, dataset: str, reading: str) -> str:
        return " / ".join(over_seeds(Chain.score, model, dataset, name, reading) for name in ("war", "uar"))

    def published(model: str, dataset: str) -> str:
        row = PUBLISHED.get(MODELS[model][1])
        return "{:.1f} / {:.1f}".format(*row[dataset.removeprefix("mini_")]) if row else ""

    main = []
    for model in models:
        beside = (text for name in SETS for text in (scores(model, name, "strict"), published(model, name)))
        main.append([MODELS[model][0], *beside])
    best = [text for name in SETS for text in ("{:.1f} / {:.1f}".format(*ceiling(scenes, name)), "")]
    main.append(["ceiling, from the true cues", *best])
    mapped = [[MODELS[model][0], *(scores(model, name, "label_map") for name in SETS)] for model in models]
    kinds = [
        [
            MODELS[model][0],
            *(over_seeds(Chain.accuracy, model, sets, kind) for sets in worlds.values() for kind in KINDS),
        ]
        for model in models
    ]
    shown = {"both": "evaluation", "picture alone": "evaluation_video", "sound alone": "evaluation_audio"}
    modalities = [
        [name, *(over_seeds(Chain.accuracy, "R1-Omni", IN_DISTRIBUTION, kind, folder) for kind in KINDS)]
        for name, folder in shown.items()
    ]
    modalities.append(["the most frequent label", *(f"{majority(scenes, IN_DISTRIBUTION, k):.1f}" for k in KINDS)])
    quality = [
        [
            MODELS[model][0],
            over_seeds(Chain.format_rate, model),
            over_seeds(Chain.sampled_format, model) if model.startswith("R1") else "",
            *(over_seeds(Chain.cues_named, model, sets) for sets in worlds.values()),
        ]
        for model in models
        if model.startswith(("EMER", "R1"))
    ]
    return {
        "WAR and UAR": (["model", *(text for name in SETS for text in (f"{name} WAR / UAR", "paper"))], main),
        "WAR and UAR, synonyms read as their label": (["model", *SETS], mapped),
        "Accuracy by kind of clip": (["model", *(f"{world}: {kind}" for world in worlds for kind in KINDS)], kinds),
        "RLVR with one modality taken away, in distribution": (["shown", *KINDS], modalities),
        "Reasoning": (
            ["model", "well-formed, greedy", "well-formed, sampled", "cues named right, in", "out"],
            quality,
        ),
    }


def gather(output: Path) -> str:
    """Writes the results; returns them as Markdown.

    Raises:
        HumanOmniError: a chain is not finished, or there is none.
    """
    scenes = read_scenes(output / "world")
    chains = [Chain(folder, scenes) for folder in sorted(output.glob("seed_*")) if (folder / "evaluation").is_dir()]
    if not chains:
        raise HumanOmniError(f"{output} holds no evaluated chain; run scripts/reproduce_mini.sh")
    found = tables(chains, scenes)
    seeds = f"Mean ± standard deviation over {len(chains)} full chains." if len(chains) > 1 else "One full chain."
    text = f"{NOTE} {seeds}\n"
    for title, (head, rows) in found.items():
        lines = [head, ["---"] * len(head), *rows]
        text += f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_whole(output / "results.md", text)
    write_json(output / "results.json", {title: [head, *rows] for title, (head, rows) in found.items()})
    first = chains[0]
    preface = f"<p>{NOTE} {seeds} Figures and predictions below are those of {first.folder.name}.</p>"
    preface += "".join(f"<h2>{title}</h2>{html_table(head, rows)}" for title, (head, rows) in found.items())
    for model in ("R1-Omni", "R1-Omni-unbiased"):
        curves = first.folder / model / "training_curves.png"
        if curves.exists():
            preface += f"<h2>Training of {MODELS[model][0]}</h2>{html_image('training curves', curves.read_bytes())}"
    shown = [model for model in ("HumanOmni", "EMER-SFT", "MAFW-DFEW-SFT-1", "R1-Omni") if model in first.models]
    write_report(output / "report", [first.run(model, dataset) for dataset in SETS for model in shown], preface)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m open_r1.mini.results", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of scripts/reproduce_mini.sh")
    options = parser.parse_args(argv)

    def program() -> None:
        print(gather(options.output), end="")
        print(f"written to {options.output}: results.md, results.json, report/report.html", file=sys.stderr)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
