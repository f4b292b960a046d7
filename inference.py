"""Clips and a question in, the model's reasoning and an emotion out.

Heavy imports wait until the command line is understood, so that help and mistakes are answered at once.
"""

import argparse
import contextlib
import glob
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# The package's own lists, written out: importing them would load torch. A test compares the two.
MODALS = ("video_audio", "video", "audio", "image", "text")
PROMPT_STYLES = ("inference", "release_sft", "release_grpo")
ASPECT_RATIOS = ("pad", "square")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")

# What decides on a text, beside the clip and the question: results made with other values do not mix in one file.
SETTINGS = (
    "prompt_style",
    "image_aspect_ratio",
    "num_frames",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "seed",
)
LISTS = (".json", ".jsonl")

EPILOG = """\
One clip: stdout is the model's text and nothing else. Several: one JSON line a clip, in order, goes to stdout, or to
the --output file instead. Everything else goes to stderr. Exit status: 0 all done, 1 some clips failed, 2 the command
cannot be carried out as given."""


class UsageError(Exception):
    """A command that cannot be carried out as given; the message is one line with the value and the mend."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_arguments(argv)
    # Where a library imports DeepSpeed on a machine without a GPU, it would announce its accelerator on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import humanomni

        try:
            return run(args)
        except (UsageError, humanomni.HumanOmniError) as error:
            print(complaint(str(error)), file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        kept = f"; the same command continues {args.output}" if args.output else ""
        print(complaint(f"interrupted{kept}"), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.strerror is None:  # not the system's own word: a bug
            raise
        where = error.filename or args.output or "stdout"
        print(complaint(f"{where}: {error.strerror}; mend its permissions or make room"), file=sys.stderr)
        return 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, its options checked as far as they can be without a model."""
    parser = OneLineParser("inference.py", description=__doc__.splitlines()[0], epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument_group("what to ask").add_argument
    add("--modal", choices=MODALS, default="video_audio", help="what the model gets of a clip (default %(default)s)")
    add(
        "--video_path",
        nargs="+",
        default=[],
        metavar="PATH",
        help="clips: files, a folder of clips, a folder of frame images (one clip), a quoted glob, or a .json or "
        ".jsonl list of paths or of objects with video or path and optional instruct, modal, start, end",
    )
    add("--instruct", help="the question (default: which emotion is the most obvious, with the think/answer sentence)")
    add("--start", type=seconds, help="use the clip from this second on")
    add("--end", type=seconds, help="use the clip up to this second")
    add("--num_frames", type=positive_int, help="frames a clip (default: as in config.json)")
    add(
        "--image_aspect_ratio",
        choices=ASPECT_RATIOS,
        help="pad frames to squares or squash them (default: squash, and as in config.json for the other styles)",
    )
    add(
        "--prompt_style",
        choices=PROMPT_STYLES,
        default="inference",
        help="the exact prompt of the released inference, SFT or GRPO (default %(default)s)",
    )

    add = parser.add_argument_group("the model").add_argument
    add("--model_path", required=True, help="checkpoint folder or cached hub id")
    add("--vision_tower", help="SigLIP: folder or cached hub id (default: HUMANOMNI_VISION_TOWER, then config.json)")
    add("--audio_tower", help="Whisper: likewise (default: HUMANOMNI_AUDIO_TOWER, then config.json)")
    add("--bert_model", help="BERT: likewise (default: HUMANOMNI_BERT_MODEL, then config.json)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the first GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--attn_implementation", choices=ATTENTION, default="sdpa", help="default %(default)s")

    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=positive_int, default=2048, help="longest answer (default %(default)s)")
    add("--do_sample", action="store_true", help="sample; the default is greedy, as released")
    add("--temperature", type=positive_float, help="with --do_sample (default: as in generation_config.json)")
    add("--top_p", type=probability, help="with --do_sample (default: as in generation_config.json)")
    add("--seed", type=int, help="makes --do_sample repeatable, for the same clips and --batch_size")
    add("--batch_size", type=positive_int, default=8, help="clips generated at once (default %(default)s)")
    add("--num_workers", type=positive_int, default=2, help="threads that read clips ahead (default %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="print the text of a single clip as it is generated")
    add(
        "--output",
        metavar="FILE.jsonl",
        help="write one JSON line a clip here: path, modal, instruct, text, think, answer, seconds, settings (or "
        "error). The same command continues where it stopped, and tries failed clips again",
    )

    args = parser.parse_args(argv)
    if args.modal == "text" and args.video_path:
        parser.error(f"--modal text takes no --video_path, but it is {args.video_path[0]}; drop one of the two")
    if args.modal != "text" and not args.video_path:
        parser.error(f"--modal {args.modal} needs --video_path; pass a clip, or --modal text")
    for name in ("start", "end"):
        if args.modal in ("image", "text") and vars(args)[name] is not None:
            parser.error(f"--{name} {vars(args)[name]:g} does not apply to --modal {args.modal}; drop it")
    for name in ("temperature", "top_p"):
        if vars(args)[name] is not None and not args.do_sample:
            parser.error(f"--{name} {vars(args)[name]:g} applies only when sampling; add --do_sample or drop it")
    return args


def positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def probability(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, 0 or more")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def run(args: argparse.Namespace) -> int:
    """Finds the clips and what is done already, and answers the rest; returns the exit status.

    Raises:
        UsageError, HumanOmniError: the command cannot be carried out, whatever the clips hold.
    """
    requests = collect_requests(args)
    single = len(requests) == 1
    if args.stream and not single:
        raise UsageError(f"--stream prints one clip, but there are {len(requests)}; drop it or pass one")
    settings = used_settings(args)
    done = read_results(Path(args.output), requests, settings) if args.output else {}
    if done:
        print(f"{args.output}: {len(done)} of {len(requests)} clips were done before", file=sys.stderr)
        if single:
            print(done[requests[0]]["text"], flush=True)
    remaining = [request for request in requests if request not in done]
    failures = answer(args, remaining, settings, single) if remaining else 0
    if failures and not single:
        retry = "; the same command tries them again" if args.output else ""
        print(complaint(f"{failures} of {len(remaining)} clips failed{retry}"), file=sys.stderr)
    return 1 if failures else 0


def answer(args: argparse.Namespace, requests: list, settings: dict, single: bool) -> int:
    """Loads the model, asks it, and prints or writes every result as it comes; returns how many clips failed."""
    import torch
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from humanomni.generation import StdoutStreamer, generate_many

    silence_libraries()
    failures = 0
    try:
        with open_output(args.output) as output, logging_redirect_tqdm():
            model, processor = load_model(args)
            results = generate_many(
                model,
                processor,
                requests,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                streamer=StdoutStreamer(processor) if args.stream else None,
                **{name: vars(args)[name] for name in SETTINGS},
            )
            for result in tqdm(results, total=len(requests), unit="clip", disable=single, file=sys.stderr):
                if result.error is not None:
                    failures += 1
                    tqdm.write(complaint(name_clip(result.error, result.request.path)), file=sys.stderr)
                if args.output or not single:
                    tqdm.write(json.dumps(to_record(result, settings), ensure_ascii=False), file=output)
                    output.flush()
                if single and result.text is not None and not args.stream:
                    print(result.text, flush=True)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"out of memory on the GPU with --batch_size {args.batch_size} and --dtype {args.dtype}; pass a smaller "
            f"--batch_size, --dtype bfloat16 or a smaller --max_new_tokens"
        ) from error
    return failures


def load_model(args: argparse.Namespace) -> tuple:
    """The model and the processor that the options name."""
    import humanomni

    return humanomni.load_pretrained(
        args.model_path,
        vision_tower=args.vision_tower,
        audio_tower=args.audio_tower,
        bert_model=args.bert_model,
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
    )


def used_settings(args: argparse.Namespace) -> dict:
    """The model, wherever the program is started, and the options of `SETTINGS` that are in use."""
    folder = Path(args.model_path).expanduser()
    model = str(folder.resolve()) if folder.exists() else args.model_path
    options = {name: vars(args)[name] for name in SETTINGS}
    return {"model": model, **{name: v for name, v in options.items() if v is not None and v is not False}}


# --------------------------------------------------------------------------------------------------------------- clips


def collect_requests(args: argparse.Namespace) -> list:
    """One `Request` for each clip that the command line names, in order, each once.

    Raises:
        UsageError, PromptError: a list does not read, no clip is there at all, or the question cannot be asked.
    """
    from humanomni.generation import Request
    from humanomni.prompts import DEFAULT_INSTRUCT, check_question

    instruct = DEFAULT_INSTRUCT if args.instruct is None else args.instruct
    check_question(instruct, args.modal)
    common = {"modal": args.modal, "instruct": instruct, "start": args.start, "end": args.end}
    if args.modal == "text":
        return [Request(**common)]
    requests = []
    for path in args.video_path:
        if Path(path).suffix.lower() in LISTS and Path(path).is_file():
            requests += [Request(**{**common, **fields}) for fields in read_list(Path(path))]
        else:
            requests += [Request(path=clip, **common) for clip in expand(path, args.modal)]
    requests = list(dict.fromkeys(requests))
    if not requests:
        raise UsageError(f"{', '.join(args.video_path)} names no clip; put some in, or mend --video_path")
    needed = [request.path for request in requests if request.modal != "text" and request.path is not None]
    if needed and not any(os.path.exists(path) for path in needed):
        others = f", nor any of the {len(needed)} clips named" if len(needed) > 1 else ""
        raise UsageError(f"{needed[0]} does not exist{others}; mend --video_path")
    return requests


def expand(path: str, modal: str) -> list[str]:
    """The clips that one --video_path stands for: those of a glob or folder, or the path itself.

    A folder without clips is itself one: a folder of frame images, or a mistake that its reader names.
    """
    if glob.has_magic(path) and not os.path.exists(path):
        return [clip for match in sorted(glob.glob(path, recursive=True)) for clip in expand_folder(match, modal)]
    return expand_folder(path, modal)


def expand_folder(path: str, modal: str) -> list[str]:
    from humanomni.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES

    if not os.path.isdir(path):
        return [path]
    suffixes = {"audio": VIDEO_SUFFIXES | AUDIO_SUFFIXES, "image": IMAGE_SUFFIXES}.get(modal, VIDEO_SUFFIXES)
    names = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.is_file() and not entry.name.startswith(".") and Path(entry.name).suffix.lower() in suffixes
    )
    return [os.path.join(path, name) for name in names] or [path]


def read_list(file: Path) -> list[dict]:
    """The entries of a JSON or JSON Lines list, as fields of `Request`; other keys, such as `conversations`, are left.

    Raises:
        UsageError: names the file and the line or entry that does not fit.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} does not read as a list: {error}; give UTF-8 text") from error
    if file.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [
            list_entry(parse_json(line, f"line {n} of {file}"), f"line {n} of {file}", file.parent)
            for n, line in lines
            if line.strip()
        ]
    entries = parse_json(text, str(file))
    if not isinstance(entries, list):
        raise UsageError(f"{file} holds a JSON {type(entries).__name__}; give a list of paths or objects")
    return [list_entry(entry, f"entry {n} of {file}", file.parent) for n, entry in enumerate(entries, 1)]


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}; mend it") from error


def list_entry(entry, where: str, folder: Path) -> dict:
    """An entry's fields; a relative path is looked up beside the list first, then in the working directory."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is {entry!r}; give a path, or an object with 'video' or 'path'")
    names = {"path": str, "modal": str, "instruct": str, "start": (int, float), "end": (int, float)}
    fields = {name: entry[name] for name in names if entry.get(name) is not None}
    if entry.get("video") is not None:
        fields["path"] = entry["video"]
    for name, value in fields.items():
        if not isinstance(value, names[name]) or isinstance(value, bool):
            kind = "a number of seconds" if name in ("start", "end") else "a string"
            raise UsageError(f"{name} in {where} is {value!r}; give {kind}")
    if "path" not in fields and fields.get("modal") != "text":
        raise UsageError(f"{where} has neither 'video' nor 'path'; give one, or modal 'text'")
    if "path" in fields and ((folder / fields["path"]).exists() or not os.path.exists(fields["path"])):
        fields["path"] = str(folder / fields["path"])
    return fields


# ------------------------------------------------------------------------------------------------------------- results


def to_record(result, settings: dict) -> dict:
    """The JSON form of a result."""
    record = {"path": result.request.path, "modal": result.request.modal, "instruct": result.request.instruct}
    record |= {name: value for name in ("start", "end") if (value := vars(result.request)[name]) is not None}
    if result.error is not None:
        return {**record, "error": result.error, "settings": settings}
    parts = {"text": result.text, "think": result.think, "answer": result.answer, "seconds": round(result.seconds, 3)}
    return {**record, **parts, "settings": settings}


def read_results(file: Path, requests: list, settings: dict) -> dict:
    """What an earlier run left in the output file: the records of the requests that have their text.

    A last line cut by a kill, and failures that will be tried again, are taken out of the file.

    Raises:
        UsageError: the file holds something else, or results of another model, question or setting.
    """
    from humanomni.generation import Request

    if not file.is_file():
        return {}
    *lines, rest = file.read_bytes().split(b"\n")
    records = [read_record(line, f"line {n} of {file}") for n, line in enumerate(lines, 1)]
    start_of_record = b'{"path": '
    if not rest.startswith(start_of_record[: len(rest)]):
        raise UsageError(f"{file} is not a file of results; pass another --output")
    questions = {request.instruct for request in requests}
    for n, record in enumerate(records, 1):
        for name in sorted(settings.keys() | record["settings"].keys()):
            made, asked = record["settings"].get(name), settings.get(name)
            if made != asked:
                raise UsageError(
                    f"line {n} of {file} was made with {name} {made!r}, this run has {asked!r}; pass another --output"
                )
        if record["instruct"] not in questions:
            raise UsageError(
                f"line {n} of {file} answers another question, {record['instruct']!r}; pass another --output"
            )
    keys = [Request(*(record.get(name) for name in Request.__dataclass_fields__)) for record in records]
    wanted = set(requests)
    kept = [i for i, key in enumerate(keys) if "text" in records[i] or key not in wanted]
    if rest or len(kept) < len(lines):
        rewritten = file.resolve().with_name(f"{file.name}.tmp")
        rewritten.write_bytes(b"".join(lines[i] + b"\n" for i in kept))
        rewritten.replace(file.resolve())
    return {keys[i]: records[i] for i in kept if keys[i] in wanted}


def read_record(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError:
        record = None
    expected = {"path", "modal", "instruct", "settings"}
    if not isinstance(record, dict) or not expected <= record.keys() or not isinstance(record["settings"], dict):
        raise UsageError(f"{where} is not a result of this program; pass another --output")
    return record


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator:
    """The file to append results to, its folder made where needed; stdout where there is no path."""
    if path is None:
        yield sys.stdout
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}; pass another") from error
    with file:
        yield file


# ------------------------------------------------------------------------------------------------------------ messages


def complaint(message: str) -> str:
    """The line that tells it on stderr."""
    return f"inference.py: error: {message}"


def name_clip(error: str, path: str | None) -> str:
    """The error with the clip it is about, where it does not say so itself."""
    return error if path is None or path in error else f"{path}: {error}"


def silence_libraries() -> None:
    """Leaves stderr to this program: no loading bars, no hints of transformers; its own warnings are marked so."""
    import logging

    import transformers

    logging.basicConfig(format="inference.py: %(levelname)s: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a character the terminal lacks is no reason to stop
    sys.exit(main())
