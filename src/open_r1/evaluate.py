"""Evaluation: checkpoints and labelled lists of clips to WAR and UAR, figures and a report.

    python -m open_r1.evaluate --config configs/evaluate.yaml --model_path MODEL --data dfew:1=lists/dfew1/test.json
    torchrun --nproc_per_node 8 -m open_r1.evaluate ...          the clips are shared among the processes
    python -m open_r1.evaluate --predictions dfew=FILE           scores answers that are already there

A set is written NAME=LIST, or NAME:FOLD=LIST for one of several folds, whose mean is then reported too. dfew, mafw and
ravdess have the classes of their table; other sets have the labels that occur. The same command continues what a kill
or an error interrupted, with any number of processes.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from humanomni import HumanOmniProcessor, HumanOmniQwen2ForCausalLM
from humanomni.errors import HumanOmniError, exit_status
from humanomni.loading import ATTENTION, resolve_device, resolve_dtype
from humanomni.modeling import find_checkpoint
from humanomni.processing import ASPECT_RATIOS
from open_r1.cache_features import FeatureCache
from open_r1.data import Sample, clip_path, read_samples
from open_r1.labels import CLASSES, SYNONYMS, read_synonyms
from open_r1.metrics import score
from open_r1.prediction import Prediction, Predictor, check_labels, classes_of
from open_r1.prediction_files import PredictionFolder, read_predictions, write_json
from open_r1.report import Run, fold_means, markdown_table, table_rows, write_report

logger = logging.getLogger(__name__)

ENTRY = re.compile(r"(?:(?P<name>[\w.+-]+)(?::(?P<fold>\d+))?=)?(?P<path>.+)")
LONGEST_WAIT = timedelta(days=7)  # of a process for the slowest one


@dataclass
class EvaluateArguments:
    """What is evaluated, and how."""

    model_path: list[str] = field(default_factory=list, metadata={"help": "Checkpoints: folders or cached hub ids."})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sets, each [NAME[:FOLD]=]LIST; a list is JSON, JSONL or a YAML mixture of samples."},
    )
    predictions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Score these files and run no model, each [NAME[:FOLD]=]FILE: JSON or JSONL with label (or gt), "
            "response and video (or video_path). Without NAME, the entries' own source tells the sets apart."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": f"NAME of sets and files given without one, e.g. {', '.join(CLASSES)}."}
    )
    model_name: str = field(default="predictions", metadata={"help": "Name of --predictions in the report."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where the results go."})
    data_folder: str = field(default="", metadata={"help": "Where the samples' relative clip paths start."})
    think: bool = field(
        default=False,
        metadata={"help": "Ask for <think> and <answer> after each question that does not: for models that reason."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer; decoding is greedy."})
    batch_size: int = field(default=8, metadata={"help": "Clips generated at once by each process."})
    num_workers: int = field(default=2, metadata={"help": "Threads of each process that read clips ahead."})
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={"help": "Frames to squares: square (squashed; default, as released inference does) or pad."},
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder made by open_r1.cache_features; the towers are then never loaded."}
    )
    vision_tower: str | None = field(default=None, metadata={"help": "SigLIP's folder, in place of config.json's."})
    audio_tower: str | None = field(default=None, metadata={"help": "Whisper's folder, in place of config.json's."})
    bert_model: str | None = field(default=None, metadata={"help": "BERT's folder, in place of config.json's."})
    device: str = field(default="auto", metadata={"help": "auto (one GPU for each process), cpu, cuda:N."})
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 on a GPU, else float32) or a data type."})
    attn_implementation: str = field(default="sdpa", metadata={"help": f"One of {', '.join(ATTENTION)}."})
    exclude_failed: bool = field(
        default=False, metadata={"help": "Leave clips that failed out of the scores; by default they count as wrong."}
    )
    label_map: str | None = field(
        default=None, metadata={"help": "YAML or JSON {label: [word, ...]} in place of the built-in synonyms."}
    )
    bootstrap_resamples: int = field(default=1000, metadata={"help": "Draws behind the 95 %% intervals."})
    seed: int = field(default=0, metadata={"help": "Of those draws, and of a mixture's random:N."})

    def __post_init__(self):
        for name in ("model_path", "data", "predictions"):
            value = getattr(self, name)  # a YAML file may hold a single text
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))

    def check(self) -> None:
        """Raises HumanOmniError where options do not go together or are out of range."""
        for name in ("max_new_tokens", "batch_size", "num_workers", "bootstrap_resamples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise HumanOmniError(f"{name} is {value!r}; pass a whole number of at least 1")
        if self.predictions and (self.model_path or self.data):
            raise HumanOmniError("predictions are scored without a model; drop --model_path and --data")
        if not self.predictions and not (self.model_path and self.data):
            raise HumanOmniError("nothing to evaluate; pass --model_path and --data, or --predictions (see --help)")
        for name, allowed in (("attn_implementation", ATTENTION), ("image_aspect_ratio", (None, *ASPECT_RATIOS))):
            if getattr(self, name) not in allowed:
                raise HumanOmniError(
                    f"{name} is {getattr(self, name)!r}; pass one of {', '.join(filter(None, allowed))}"
                )


@dataclass(frozen=True)
class Entry:
    """A list of samples or a file of predictions, and the set (and fold) it belongs to."""

    path: str
    name: str
    fold: int | None = None

    @property
    def title(self) -> str:
        return self.name if self.fold is None else f"{self.name}:{self.fold}"

    @property
    def folder(self) -> str:
        return self.name if self.fold is None else f"{self.name}_fold_{self.fold}"

    def classes(self, labels: list[str]) -> tuple[str, ...]:
        """The set's own classes, or those of the labels where there is no table of it."""
        return CLASSES.get(self.name) or classes_of(labels)


class Processes:
    """The processes that share the work, as torchrun starts them; one where it did not."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            if "MASTER_ADDR" not in os.environ:
                raise HumanOmniError(f"WORLD_SIZE is {self.size}, but MASTER_ADDR is not set; start with torchrun")
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)

    def from_first(self, function: Callable):
        """What `function` returns, or the user's mistake it raises, on the first process, which alone calls it."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except HumanOmniError as error:
                box[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(box)
        if box[1] is not None:
            raise HumanOmniError(box[1])
        return box[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class _Parser(TrlParser):
    def error(self, message: str):
        raise HumanOmniError(f"{message} (see --help)")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for a mistake of the user's."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=os.environ.get("LOG_LEVEL", "WARNING"))

    def program() -> None:
        arguments = parse_arguments(argv)
        synonyms = read_synonyms(arguments.label_map) if arguments.label_map else SYNONYMS
        runs = score_files(arguments, synonyms) if arguments.predictions else evaluate(arguments, synonyms)
        if runs:
            report_all(Path(arguments.output_dir), runs)

    return exit_status(program)


def parse_arguments(argv: list[str] | None) -> EvaluateArguments:
    parser = _Parser(
        (EvaluateArguments,),
        prog="python -m open_r1.evaluate",
        description=f"{__doc__.splitlines()[0]} --config FILE.yaml sets any of these options.",
        epilog=" ".join(__doc__.split("\n\n")[2].split()),
    )
    try:
        (arguments,) = parser.parse_args_and_config(argv)
    except HumanOmniError:
        raise
    except (OSError, ValueError, IndexError, yaml.YAMLError) as error:
        raise HumanOmniError(f"the options cannot be read: {' '.join(str(error).split())}") from error
    arguments.check()
    return arguments


def parse_entries(texts: list[str], dataset: str | None) -> list[Entry]:
    """`[NAME[:FOLD]=]PATH` for each; a nameless one is named by `dataset`, else by its file.

    Raises:
        HumanOmniError: two entries have the same name and fold.
    """
    entries = []
    for text in texts:
        parts = ENTRY.fullmatch(text)
        name = (parts["name"] or dataset or Path(parts["path"]).stem).lower()
        entries.append(Entry(parts["path"], name, int(parts["fold"]) if parts["fold"] else None))
    check_distinct(entries)
    return entries


def check_distinct(entries: list[Entry]) -> None:
    for place, entry in enumerate(entries):
        twin = next((other for other in entries[:place] if other.folder == entry.folder), None)
        if twin is not None:
            raise HumanOmniError(
                f"{entry.path} and {twin.path} are both the set {entry.title}; name them apart, e.g. "
                f"{entry.name}:1={twin.path} {entry.name}:2={entry.path}"
            )


# ---------------------------------------------------------------------------------------------------- running a model


def evaluate(arguments: EvaluateArguments, synonyms: dict) -> list[Run]:
    """Answers every set with every checkpoint; returns the scored runs on the first process, nothing on others."""
    entries = parse_entries(arguments.data, arguments.dataset)
    samples = {entry: read_set(entry, arguments) for entry in entries}
    processes = Processes()
    runs = []
    try:
        for name, path in zip(short_names(arguments.model_path), arguments.model_path, strict=True):
            checkpoint = Checkpoint(name, path, arguments)
            for entry, some in samples.items():
                runs.append(evaluate_set(checkpoint, entry, some, arguments, synonyms, processes))
    finally:
        processes.close()
    return [run for run in runs if run is not None]


def read_set(entry: Entry, arguments: EvaluateArguments) -> list[Sample]:
    """The samples of a set, checked as far as they can be without a model."""
    samples = read_samples(entry.path, arguments.seed)
    check_labels(samples, entry.classes([sample.answer for sample in samples]))
    if arguments.feature_cache is None:
        paths = [clip_path(sample.clip, arguments.data_folder) for sample in samples if sample.clip is not None]
        missing = [path for path in paths if not path.exists()]
        if missing and len(missing) == len(paths):
            raise HumanOmniError(
                f"{entry.path}: none of its {len(paths)} clips is there, e.g. {missing[0]}; set --data_folder"
            )
        if missing:
            logger.warning("%s: %d of %d clips are missing, e.g. %s", entry.path, len(missing), len(paths), missing[0])
    return samples


def evaluate_set(
    checkpoint: "Checkpoint",
    entry: Entry,
    samples: list[Sample],
    arguments: EvaluateArguments,
    synonyms: dict,
    processes: Processes,
) -> Run | None:
    """One checkpoint on one set; returns the scored run on the first process."""
    predictor = checkpoint.predictor(samples)
    settings = checkpoint.settings(predictor)
    identity = {**settings, "checkpoint": checkpoint_stamp(checkpoint.path), "samples": digest(samples)}
    folder = PredictionFolder(Path(arguments.output_dir) / checkpoint.name / entry.folder, identity)
    left = processes.from_first(lambda: unanswered(predictor, folder.open()))
    own = left[processes.rank :: processes.size]
    if own:
        answer(predictor, checkpoint.model, own, folder, processes.rank, f"{checkpoint.name}, {entry.title}")
    processes.wait()
    about = {"model_path": checkpoint.path, "data": entry.path, "data_folder": arguments.data_folder, **settings}
    runs = []

    def conclude() -> None:
        runs.append(score_run(checkpoint.name, entry, folder.finish(len(samples)), arguments, synonyms, about))

    processes.from_first(conclude)
    return runs[0] if runs else None


class Checkpoint:
    """A checkpoint under evaluation; its weights are loaded when there is a question left to ask.

    Args:
        name: short, for the report and its folder.
    """

    def __init__(self, name: str, path: str, arguments: EvaluateArguments):
        self.name, self.path, self.arguments = name, path, arguments
        self.towers = {
            "vision_tower": arguments.vision_tower,
            "audio_tower": arguments.audio_tower,
            "bert_model": arguments.bert_model,
        }
        self.device = own_device(arguments.device)
        self.dtype = resolve_dtype(arguments.dtype, self.device)
        self.processor = HumanOmniProcessor.from_pretrained(path, **self.towers)
        self.cache = None
        if arguments.feature_cache is not None:
            self.cache = FeatureCache(arguments.feature_cache, self.processor, arguments.data_folder)

    @cached_property
    def model(self) -> HumanOmniQwen2ForCausalLM:
        disable_progress_bar()
        return HumanOmniQwen2ForCausalLM.from_pretrained(
            self.path,
            config=self.processor.config,
            dtype=self.dtype,
            attn_implementation=self.arguments.attn_implementation,
            load_towers=self.cache is None,
            **self.towers,
        ).to(self.device)

    def predictor(self, samples: list[Sample]) -> Predictor:
        return Predictor(
            self.processor,
            samples,
            data_folder=self.arguments.data_folder,
            feature_cache=self.cache,
            image_aspect_ratio=self.arguments.image_aspect_ratio,
            think=self.arguments.think,
            batch_size=self.arguments.batch_size,
            max_new_tokens=self.arguments.max_new_tokens,
            num_workers=self.arguments.num_workers,
        )

    def settings(self, predictor: Predictor) -> dict:
        """What the answers depend on, besides the weights and the samples."""
        return {
            "think": self.arguments.think,
            "max_new_tokens": self.arguments.max_new_tokens,
            "batch_size": self.arguments.batch_size,
            "image_aspect_ratio": predictor.image_aspect_ratio,
            "cached_features": self.cache is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attn_implementation": self.arguments.attn_implementation,
            **self.towers,
        }


def unanswered(predictor: Predictor, lines: dict[int, dict]) -> list[tuple[int, ...]]:
    """The batches that hold a sample without an answer; one that failed is tried again."""
    answered = {index for index, line in lines.items() if "error" not in line}
    return [batch for batch in predictor.batches if not answered.issuperset(batch)]


def answer(
    predictor: Predictor, model, batches: list[tuple[int, ...]], folder: PredictionFolder, rank: int, title: str
) -> None:
    """Asks the model about this process's batches and writes down each answer as it comes."""
    bar = tqdm(total=sum(map(len, batches)), desc=title, unit="clip", disable=rank > 0)
    with bar, logging_redirect_tqdm(), folder.appending(rank) as add:
        for predictions in predictor.answer(model, batches):
            for prediction in predictions:
                add(as_line(prediction, predictor.questions[prediction.index].sample))
                if prediction.error:
                    logger.warning("%s: %s", title, prediction.error)
            bar.update(len(predictions))


def as_line(prediction: Prediction, sample: Sample) -> dict:
    """A line of `predictions.jsonl`."""
    span = {name: value for name, value in (("start", sample.start), ("end", sample.end)) if value is not None}
    line = {"index": prediction.index, "video": sample.clip, **span, "label": sample.answer}
    line["response"] = prediction.response
    return line if prediction.error is None else {**line, "error": prediction.error}


def own_device(asked: str) -> torch.device:
    """The device asked for; with `auto` and several GPUs, this process's own."""
    if asked == "auto" and torch.cuda.device_count() > 1:
        asked = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return resolve_device(asked)


def checkpoint_stamp(path: str) -> dict[str, list[int]]:
    """Size and time of the checkpoint's files: training may write another one to the same folder."""
    files = sorted(file for file in find_checkpoint(path).iterdir() if file.suffix in (".safetensors", ".bin"))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def digest(samples: list[Sample]) -> str:
    content = [{**asdict(sample), "origin": None} for sample in samples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path; more parts where that does not tell them apart.

    Raises:
        HumanOmniError: a checkpoint is given twice.
    """
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise HumanOmniError(f"a checkpoint stands twice in model_path: {' '.join(paths)}; drop one")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(some[-length:]).strip("/") for some in parts]
        if len(set(names)) == len(names):
            break
    return names


# ------------------------------------------------------------------------------------------------------------ scoring


def score_files(arguments: EvaluateArguments, synonyms: dict) -> list[Run]:
    """Scores files of predictions; a file without NAME whose entries tell their sources holds a set for each."""
    sets: dict[Entry, list[dict]] = {}
    for text, entry in zip(
        arguments.predictions, parse_entries(arguments.predictions, arguments.dataset), strict=True
    ):
        predictions = read_predictions(entry.path)
        named = ENTRY.fullmatch(text)["name"] or arguments.dataset
        for prediction in predictions:
            own = entry if named or not prediction["source"] else Entry(entry.path, prediction["source"])
            sets.setdefault(own, []).append(prediction)
    check_distinct(list(sets))
    return [
        score_run(arguments.model_name, entry, predictions, arguments, synonyms, {"predictions": entry.path})
        for entry, predictions in sets.items()
    ]


def score_run(
    model: str, entry: Entry, predictions: list[dict], arguments: EvaluateArguments, synonyms: dict, about: dict
) -> Run:
    """Scores one checkpoint on one set, and writes `metrics.json`, the figures and the report of that run.

    Args:
        about: where the predictions come from, for `metrics.json`.
    """
    labels = [prediction["label"] for prediction in predictions]
    metrics = score(
        labels,
        [prediction["response"] for prediction in predictions],
        entry.classes(labels),
        synonyms,
        arguments.exclude_failed,
        arguments.bootstrap_resamples,
        arguments.seed,
    )
    run = Run(model, entry.name, metrics, predictions, entry.fold)
    folder = Path(arguments.output_dir) / model / entry.folder
    about = {**about, "label_map": arguments.label_map}
    head = {"model": model, "dataset": entry.name, "fold": entry.fold, "settings": about}
    write_json(folder / "metrics.json", {**head, **metrics})
    write_report(folder, [run])
    return run


def report_all(folder: Path, runs: list[Run]) -> None:
    """Prints the table; writes the report of several runs together, and the means over folds."""
    if len(runs) > 1:
        write_report(folder, runs)
        write_json(folder / "summary.json", {"fold_means": fold_means(runs)})
    print(markdown_table(table_rows(runs)), end="")
    print(f"results are in {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
