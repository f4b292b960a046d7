"""Turns DFEW, MAFW, RAVDESS and EMER, as downloaded, into lists of training and test samples, and merges such lists.

    python -m open_r1.prepare_data dfew --root /data/DFEW --fold 2 --output lists/dfew
    python -m open_r1.prepare_data merge mafw=lists/mafw/train.json dfew=lists/dfew/train.json --output lists/rlvr.json

`docs/datasets.md` describes the layouts, the files written and the published counts.
"""

import argparse
import ast
import io
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from humanomni.errors import HumanOmniError, MediaError, exit_status
from humanomni.prompts import DEFAULT_INSTRUCT, EMOTION_QUESTION
from open_r1 import labels
from open_r1.metrics import parse_answer

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")  # in order of preference
DFEW_CLIPS = (
    "videos",
    "Clip/original",
    "original",
    "Clip/videos",
    "Clip",
    "Clip/clip_224x224",
    "Clip/clip_224x224_16f",
)
MAFW_CLIPS = ("data/clips", "clips", "videos", "data")

# Headers in lower case, as the sets and their circulating copies write them.
NAME_HEADERS = ("video_name", "name", "names", "clip", "video", "order", "filename")
LABEL_HEADERS = ("label", "emotion", "single_label")

DFEW_TREE = """\
DFEW/
  EmoLabel_DataSplit/
    train(single-labeled)/set_1.csv .. set_5.csv      (or label/single_trainset_1.csv ..)
    test(single-labeled)/set_1.csv .. set_5.csv       (or label/single_testset_1.csv ..)
  videos/1.mp4 ..                                     (or Clip/original/, Clip/clip_224x224/, ...)
  Annotation/annotation.xlsx                          (optional: the splits are checked against it)"""
MAFW_TREE = """\
MAFW/
  Train & Test Set/                                   (or split/)
    single/no_caption/set_1/train.txt, test.txt ..    (or another --labels)
  data/clips/00019.mp4 ..                             (or clips/, videos/)
  Labels/single-set.xlsx                              (optional: the splits are checked against it)"""
RAVDESS_TREE = """\
RAVDESS/
  Actor_01/01-01-01-01-01-01-01.mp4 ..                (or Video_Speech_Actor_01/Actor_01/ ..)
  ..
  Actor_24/"""
EMER_TREE = """\
EMER/
  final-EMER-reason.csv, check-openset.csv            (EMER v2; or gt-eng.csv / gt-chi.csv, EMER v1)
  video/sample_00000967.mp4 ..                        (any folder; .mp4 or .avi)
  train-label.csv, label-disdim.csv                   (optional: MER2023, MER2024 labels)
  track3_*.csv, track2_train_*.csv                    (optional: MER2025 reasons and labels)"""


@dataclass
class Row:
    """One line of a label file: a clip, its split, its label and what the model is asked and shall say."""

    split: str
    name: str  # as the label file writes it
    label: str
    question: str = EMOTION_QUESTION
    answer: str | None = None  # the label where None
    clip: Path | None = None  # None: not on disk
    has_sound: bool | None = None  # None: not known
    fault: str | None = None  # why the clip cannot be read


@dataclass
class Listing:
    """What a set's label files say, before a look at the clips."""

    title: str
    tree: str
    rows: list[Row]
    clips: dict[str, Path]  # by `clip_key`
    published: dict[tuple[str, str], int] = field(default_factory=dict)  # (split, class), "all" for a sum
    notes: list[str] = field(default_factory=list)


def main(argv=None):
    """Runs the command line; returns the exit status: 0, or 2 for a mistake of the user's."""
    args = parse_arguments(argv)
    return exit_status(lambda: print(args.run(args)))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m open_r1.prepare_data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="dfew|mafw|ravdess|emer|merge")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", type=Path, required=True, help="folder of the set")
    shared.add_argument("--output", type=Path, required=True, help="folder for the lists and the report")
    shared.add_argument(
        "--data-root", type=Path, help="folder the video paths are relative to (default: parent of --root)"
    )
    shared.add_argument(
        "--check-media", action="store_true", help="decode a frame and a second of sound of every clip"
    )
    shared.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes that open clips")

    def command(name, read, tree):
        sub = commands.add_parser(
            name,
            parents=[shared],
            help=f"convert {name.upper()}",
            description=f"Expected layout:\n\n{tree}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=convert, read=read)
        return sub

    for name, read, tree in (("dfew", read_dfew, DFEW_TREE), ("mafw", read_mafw, MAFW_TREE)):
        sub = command(name, read, tree)
        sub.add_argument("--fold", type=int, required=True, choices=range(1, 6), help="official split")
        sub.add_argument("--clips", type=Path, help="folder of the clips (default: the first usual one that has any)")
    kinds = [f"{kind}/{caption}" for kind in ("single", "compound") for caption in ("no_caption", "with_caption")]
    sub.add_argument("--labels", choices=kinds, default=kinds[0], help="folder of the split files (%(default)s)")

    sub = command("ravdess", read_ravdess, RAVDESS_TREE)
    split = sub.add_mutually_exclusive_group()
    split.add_argument("--fold", type=int, choices=range(1, 7), help="of 6: tests on four consecutive actors")
    split.add_argument("--test-actors", type=actor_numbers, help="such as 20-24 or 1,2,5 (default: all, no training)")
    sub.add_argument(
        "--modality", choices=("01", "02"), default="01", help="01 with sound, 02 video only (%(default)s)"
    )
    sub.add_argument("--channel", choices=("01", "02"), default="01", help="01 speech, 02 song (%(default)s)")

    sub = command("emer", read_emer, EMER_TREE)
    sub.add_argument("--language", choices=("english", "chinese"), default="english", help="of the reasons")

    sub = commands.add_parser("merge", help="join and shuffle lists", description="Joins and shuffles lists.")
    sub.add_argument("lists", nargs="+", metavar="[NAME=]LIST.json", help="lists of samples (.json or .jsonl)")
    sub.add_argument("--output", type=Path, required=True, help="the list to write (.json)")
    sub.add_argument("--seed", type=int, default=42, help="of the shuffle and of --take (%(default)s)")
    sub.add_argument("--take", action="append", default=[], metavar="NAME=N", help="draw N samples of one list")
    sub.add_argument("--limit", type=positive, help="keep this many samples of the shuffled whole")
    sub.set_defaults(run=merge)
    return parser.parse_args(argv)


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def actor_numbers(text):
    """Reads "20-24" or "1,2,5" as a set of actor numbers."""
    actors = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not an actor number or a range; write 20-24 or 1,2,5")
        actors.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not actors or not actors <= set(labels.RAVDESS_ACTORS):
        raise argparse.ArgumentTypeError(f"{text!r} names actors outside 1-24")
    return actors


# --- the sets -------------------------------------------------------------------------------------------------------


def read_dfew(args):
    """Reads the official split of a fold: train and test rows with R1-Omni's words."""
    root, fold = args.root, args.fold
    rows = []
    for split in ("train", "test"):
        stems = (f"EmoLabel_DataSplit/{split}(single-labeled)/set_{fold}", f"label/single_{split}set_{fold}")
        path = find_file(root, [stem + suffix for stem in stems for suffix in (".csv", ".xlsx")], DFEW_TREE)
        rows += label_rows(path, split, labels.DFEW_IDS)
    listing = Listing(f"DFEW fold {fold}", DFEW_TREE, rows, find_clips(args, rows, DFEW_CLIPS, DFEW_TREE))
    count_rows(listing, labels.DFEW_FOLD_COUNTS, fold)
    listing.published["train+test", "all"] = labels.DFEW_TOTAL
    if fold == 1:
        listing.published |= {("test", label): count for label, count in labels.DFEW_FOLD_1_TEST_COUNTS.items()}
    ids = labels.DFEW_IDS | {labels.DFEW_NO_SINGLE_LABEL: None}
    check_annotation(listing, root / "Annotation" / "annotation.xlsx", ids, labels.DFEW_TOTAL)
    return listing


def read_mafw(args):
    """Reads the official split of a fold; a compound label such as `anger_disgust` becomes `angry, disgust`."""
    root, fold, kind = args.root, args.fold, args.labels
    rows = []
    for split in ("train", "test"):
        places = [f"{top}/{kind}/set_{fold}/{split}.txt" for top in ("Train & Test Set", "split")]
        rows += label_rows(find_file(root, places, MAFW_TREE), split, labels.MAFW_WORDS)
    clips = find_clips(args, rows, MAFW_CLIPS, MAFW_TREE)
    listing = Listing(f"MAFW {kind} fold {fold}", MAFW_TREE, rows, clips)
    if kind == "single/no_caption":
        count_rows(listing, labels.MAFW_FOLD_COUNTS, fold)
    if kind.startswith("single"):
        counts = {label: count for label, count in labels.MAFW_CLASS_COUNTS.items() if label != "neutral"}
        if kind == "single/no_caption":
            counts = labels.MAFW_CLASS_COUNTS
        listing.published |= {("train+test", label): count for label, count in counts.items()}
        listing.published["train+test", "all"] = sum(counts.values())
        total = sum(labels.MAFW_CLASS_COUNTS.values())
        ids = labels.MAFW_IDS | labels.MAFW_WORDS
        check_annotation(listing, root / "Labels" / "single-set.xlsx", ids, total)
    else:
        listing.published["train+test", "all"] = labels.MAFW_COMPOUND_TOTAL
    silent = {clip_key(name) for name in labels.MAFW_WITHOUT_SOUND}
    listing.notes.append(
        f"{sum(clip_key(row.name) in silent for row in rows)} of the {len(silent)} single-label clips known to be "
        "without sound are listed"
    )
    return listing


def read_ravdess(args):
    """Lists the clips that the set's naming scheme implies, so that a missing one shows."""
    per_actor = labels.RAVDESS_CLIPS_PER_ACTOR[args.channel]
    actors = set(labels.RAVDESS_ACTORS) - set(labels.RAVDESS_ACTORS_WITHOUT_SONG if args.channel == "02" else ())
    test, note = actors, "all actors are test actors (out of distribution); --fold or --test-actors splits them"
    if args.fold or args.test_actors:
        test = actors & (args.test_actors or set(range(4 * args.fold - 3, 4 * args.fold + 1)))
        note = f"test actors: {', '.join(map(str, sorted(test)))}"
    splits = {"train": actors - test, "test": test}
    rows = [
        Row(split, name, labels.RAVDESS_CODES[name.split("-")[2]])
        for split, some in splits.items()
        for actor in sorted(some)
        for name in ravdess_names(args.modality, args.channel, actor)
    ]
    files = sorted([*args.root.glob("Actor_*/*"), *args.root.glob("*/Actor_*/*")])
    clips = index_clips(files)
    if not clips:
        raise HumanOmniError(f"no Actor_*/*.mp4 under {args.root}; expected\n{RAVDESS_TREE}")
    kind = f"{'song' if args.channel == '02' else 'speech'}, {'video only' if args.modality == '02' else 'with sound'}"
    listing = Listing(f"RAVDESS {kind}", RAVDESS_TREE, rows, clips, notes=[note])
    for split, some in (*splits.items(), ("train+test", actors)):
        listing.published |= {(split, label): len(some) * count for label, count in per_actor.items()}
        listing.published[split, "all"] = len(some) * sum(per_actor.values())
    scheme = re.compile(rf"{args.modality}-{args.channel}-\d\d-\d\d-\d\d-\d\d-\d\d")
    names = {row.name for row in rows}
    strange = [path.name for path in files if scheme.fullmatch(path.stem) and path.stem not in names]
    if strange:
        listing.notes.append(f"{len(strange)} file names outside the scheme are ignored: {shorten(strange)}")
    return listing


def ravdess_names(modality, channel, actor):
    """Yields the file stems of one actor: neutral has one intensity, each other emotion two."""
    for code, label in labels.RAVDESS_CODES.items():
        if label not in labels.RAVDESS_CLIPS_PER_ACTOR[channel]:
            continue
        for intensity in ("01",) if label == "neutral" else ("01", "02"):
            for statement in ("01", "02"):
                for repetition in ("01", "02"):
                    yield f"{modality}-{channel}-{code}-{intensity}-{statement}-{repetition}-{actor:02d}"


def read_emer(args):
    """Joins reasons and labels by clip name into cold-start samples.

    A label is the discrete one of MER, else the first open-vocabulary word that means one of R1-Omni's words.
    """
    tables = {path.name: path for path in sorted(args.root.rglob("*.csv"), reverse=True)}
    v1 = "gt-eng.csv" if args.language == "english" else "gt-chi.csv"
    sources = [(name, args.language) for name in ("final-EMER-reason.csv",) if name in tables]
    sources += [(name, "reasons") for name in (v1,) if name in tables]
    sources += [(name, "reason") for name in sorted(tables) if name.startswith("track3_")]
    if not sources:
        raise HumanOmniError(
            f"no final-EMER-reason.csv, {v1} or track3_*.csv under {args.root}; expected\n{EMER_TREE}"
        )

    words = emer_words(tables)
    rows, notes, seen = [], [], set()
    for name, column in sources:
        table = read_columns(tables[name], (column,), headless=False)
        notes.append(f"{name}: {compare(len(table), labels.EMER_ROWS.get(name))} rows")
        without_reason, without_label, with_tags = [], [], []
        for clip, reason in table:
            key, reason = clip_key(clip), reason.strip()
            known = (labels.canonical(word, labels.EMOTION_WORDS) for word in words.get(key, ()))
            label = next(filter(None, known), None)
            answer = f"<think>{reason}</think>\n<answer>{label}</answer>"
            if key in seen:
                continue
            if not reason:
                without_reason.append(clip)
            elif label is None:
                without_label.append(clip)
            elif re.search(r"</?(think|answer)>", reason):
                with_tags.append(clip)
            else:
                seen.add(key)
                rows.append(Row("train", clip, label, DEFAULT_INSTRUCT, answer))
        for why, clips in (
            ("without a reason", without_reason),
            ("without a label among R1-Omni's words", without_label),
            ("with a tag of the answer format in the reason", with_tags),
        ):
            notes += [f"{name}: {len(clips)} left out {why}: {shorten(clips)}"] if clips else []
    if not rows:
        raise HumanOmniError(
            f"no clip of {shorten([name for name, _ in sources])} has a label; put check-openset.csv or MER's "
            f"train-label.csv under {args.root}; expected\n{EMER_TREE}"
        )
    files = [path for path in sorted(args.root.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]
    return Listing("EMER cold start", EMER_TREE, rows, index_clips(files), notes=notes)


def emer_words(tables):
    """Returns the label words of each clip, from the surest source to the least sure."""
    sources = [(name, "discrete") for name in ("train-label.csv", "label-disdim.csv") if name in tables]
    sources += [("check-openset.csv", "openset")] if "check-openset.csv" in tables else []
    sources += [(name, "openset") for name in sorted(tables) if name.startswith("track2_train_")]
    sources += [("gt-eng.csv", "emotions")] if "gt-eng.csv" in tables else []
    words = {}
    for name, column in sources:
        for clip, text in read_columns(tables[name], (column,), headless=False):
            words.setdefault(clip_key(clip), []).extend(split_words(text))
    return words


def split_words(text):
    """Splits "['worried', 'sad']", "worried, sad" or "worried" into words."""
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        parsed = text.strip().strip("[]")
    if isinstance(parsed, (list, tuple)):
        return [str(word) for word in parsed]
    return [word for word in re.split("[,;/\u3001\uff0c\uff1b]", str(parsed)) if word.strip()]


# --- label files ----------------------------------------------------------------------------------------------------


def find_file(root, places, tree):
    """Returns the first of `places` under `root`; raises with the expected tree if there is none."""
    for place in places:
        if (root / place).is_file():
            return root / place
    raise HumanOmniError(f"{places[0]} is not under {root}; give --root the folder that looks like this\n{tree}")


def read_columns(path, values, headless=True):
    """Reads the clip names and one other column of a csv, xlsx or txt file as pairs of stripped strings.

    `values` are the headers, in lower case, that the other column may have. A file without any header may still be
    read where `headless`: then the first two columns count.
    """
    table = read_table(path)
    header = [cell.strip().casefold() for cell in table[0]] if table else []
    name_at = next((i for i, cell in enumerate(header) if cell in NAME_HEADERS), None)
    value_at = next((i for i, cell in enumerate(header) if cell in values), None)
    has_header = not headless or name_at is not None or value_at is not None
    if has_header and (name_at is None or value_at is None):
        wanted = " and ".join("/".join(group) for group in (NAME_HEADERS, values))
        raise HumanOmniError(f"{path} begins with {', '.join(header)!r}; it needs the headers {wanted}")
    name_at, value_at = (name_at, value_at) if has_header else (0, 1)
    pairs = []
    for number, cells in enumerate(table[has_header:], start=1 + has_header):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(name_at, value_at):
            raise HumanOmniError(f"{path} line {number} is {' '.join(cells)!r}, without a label; mend or delete it")
        pairs.append((cells[name_at].strip(), cells[value_at].strip()))
    return pairs


def read_table(path):
    """Reads every cell of a csv, xlsx or txt file as text; returns a list of rows."""
    from zipfile import BadZipFile

    import pandas as pd

    try:
        if path.suffix == ".xlsx":
            frame = pd.read_excel(path, header=None, dtype=str, keep_default_na=False)
            return frame.fillna("").values.tolist()
        text = decode(path.read_bytes())
        if path.suffix == ".txt":
            return [line.split("\t") if "\t" in line else line.split() for line in text.split("\n")]
        frame = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False, skip_blank_lines=False)
        return frame.fillna("").values.tolist()
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise HumanOmniError(f"{path} cannot be read ({' '.join(str(error).split())}); download it again") from error


def decode(data):
    """Decodes UTF-8 with or without a mark, UTF-16 with one, or GB18030, in which the sets' Chinese captions are."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")  # the captions may come out wrong; names and labels are ASCII


def label_rows(path, split, table):
    """Reads one split file; a label is an id or a word of `table`, or several words joined by `_`."""
    known = table | {word: word for word in table.values()}
    rows = []
    for number, (name, text) in enumerate(read_columns(path, LABEL_HEADERS), start=1):
        parts = [known.get(without_point_zero(part)) for part in text.casefold().split("_")]
        if number == 1 and None in parts and not any(character.isdigit() for character in name):
            continue  # a header in words of its own
        if None in parts:
            raise HumanOmniError(f"{path} labels clip {name!r} {text!r}; a label must be one of {', '.join(table)}")
        rows.append(Row(split, name, ", ".join(parts)))
    return rows


def check_annotation(listing, path, table, total):
    """Notes how many labels of the splits differ from the annotation table, if the set came with it."""
    if not path.is_file():
        return
    try:
        pairs = read_columns(path, LABEL_HEADERS)
    except HumanOmniError as error:
        listing.notes.append(f"not checked against the annotation: {error}")
        return
    annotated = {clip_key(name): table.get(without_point_zero(text.casefold())) for name, text in pairs}
    single = sum(label is not None for label in annotated.values())
    differing = [row.name for row in listing.rows if annotated.get(clip_key(row.name)) != row.label]
    listing.notes.append(f"{path.name}: {compare(single, total)} clips with a single label")
    listing.notes.append(f"{path.name}: {len(differing)} clips of the split have another label{listed(differing)}")


def without_point_zero(text):
    return text.strip().removesuffix(".0")


def clip_key(name):
    """The name without folder, suffix, ".0" of a number read as float, and leading zeros: "00019.mp4" is "19"."""
    name = name.strip().replace("\\", "/").rsplit("/", 1)[-1]
    stem, suffix = os.path.splitext(name)
    stem = stem if suffix.lower() in (*VIDEO_SUFFIXES, ".0") else name
    return stem.lstrip("0") or "0"


# --- clips ----------------------------------------------------------------------------------------------------------


def find_clips(args, rows, folders, tree):
    """Returns the index of the first folder that holds any clip of the rows, or of `--clips`."""
    wanted = {clip_key(row.name) for row in rows}
    places = [args.clips if args.clips.is_absolute() else args.root / args.clips] if args.clips else None
    for folder in places or [args.root / folder for folder in folders]:
        clips = index_clips(sorted(folder.iterdir())) if folder.is_dir() else {}
        if wanted & clips.keys():
            return clips
    where = args.clips or ", ".join(folders)
    raise HumanOmniError(f"none of the {len(wanted)} listed clips is in {where} under {args.root}; expected\n{tree}")


def index_clips(paths):
    """Maps `clip_key` to the path of a video file or a folder of frames; files go before folders."""
    ranked = {suffix: rank for rank, suffix in enumerate((*VIDEO_SUFFIXES, ""))}
    clips = {}
    for path in sorted(paths, key=lambda path: ranked.get(path.suffix.lower(), len(ranked))):
        if path.suffix.lower() in VIDEO_SUFFIXES or (path.suffix == "" and path.is_dir()):
            clips.setdefault(clip_key(path.name), path)
    return clips


def count_rows(listing, counts, fold):
    for split, folds in counts.items():
        listing.published[split, "all"] = folds[fold - 1]


def drop_repeated(listing):
    """Keeps the first row of each clip; notes repeated ones and, above all, clips of both splits."""
    first, kept, repeated, leaked = {}, [], [], []
    for row in listing.rows:
        earlier = first.setdefault(clip_key(row.name), row)
        if earlier is row:
            kept.append(row)
        else:
            (repeated if earlier.split == row.split else leaked).append(row.name)
    listing.rows = kept
    if repeated:
        listing.notes.append(f"{len(repeated)} repeated lines left out{listed(repeated)}")
    if leaked:
        listing.notes.append(f"{len(leaked)} clips are in train and test, and left out of test{listed(leaked)}")


def probe_clip(path, decode_it):
    """Opens one clip; returns (why it cannot be read or None, whether it has sound or None).

    With `decode_it` one frame and, if there is sound, one second of it are decoded; else only the header is read.
    """
    from humanomni.media import has_audio_stream, read_frames, read_waveform

    try:
        has_sound = path.is_file() and has_audio_stream(path)
        if decode_it:
            read_frames(path, 1)
            if has_sound:
                read_waveform(path, max_seconds=1)
    except (MediaError, OSError) as error:
        return " ".join(str(error).split()), None
    return None, has_sound


def probe_clips(paths, decode_it, workers):
    """Runs `probe_clip` over all paths in several processes; a clip that kills its process is a bad clip."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from contextlib import suppress

    from tqdm import tqdm

    # A fork server: the readers are imported once, and no decoder's threads and locks have to survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["humanomni.media"])
    results, pending, size = {}, list(paths), workers
    with tqdm(total=len(pending), desc="opening clips", unit="clip") as progress:
        while pending:
            with ProcessPoolExecutor(min(size, len(pending)), mp_context=context) as pool:
                pool.submit(os.getpid).result()  # where no process can start at all, no clip is to blame
                futures = {}
                with suppress(BrokenProcessPool):  # a clip may break the pool before the last one is handed in
                    for path in pending:
                        futures[pool.submit(probe_clip, path, decode_it)] = path
                for future in as_completed(futures):
                    with suppress(BrokenProcessPool):
                        results[futures[future]] = future.result()
                        progress.update()
            pending = [path for path in pending if path not in results]
            if pending and size == 1:  # a single process works in order, so the first without a result killed it
                results[pending.pop(0)] = ("the process that read it died", None)
                progress.update()
            size = 1
    return results


# --- output ---------------------------------------------------------------------------------------------------------


def convert(args):
    """Reads a set, looks at its clips, writes lists and report; returns the report."""
    if not args.root.is_dir():
        raise HumanOmniError(f"--root {args.root} is not a folder; give the folder of the set")
    data_root = Path(os.path.abspath(args.data_root or args.root / ".."))
    listing = args.read(args)
    drop_repeated(listing)
    for row in listing.rows:
        row.clip = listing.clips.get(clip_key(row.name))
    found = [row for row in listing.rows if row.clip is not None]
    if not found:
        raise HumanOmniError(
            f"none of the {len(listing.rows)} listed clips is under {args.root}; expected\n{listing.tree}"
        )
    if not Path(os.path.abspath(found[0].clip)).is_relative_to(data_root):
        raise HumanOmniError(f"{found[0].clip} is not under --data-root {data_root}; give a folder above the clips")
    probed = probe_clips([row.clip for row in found], args.check_media, args.workers)
    for row in found:
        row.fault, row.has_sound = probed[row.clip]
    return write_lists(listing, args.output, data_root, args.check_media)


def write_lists(listing, output, data_root, checked):
    """Writes `train.json` and `test.json` (the splits that the set has), the lists of odd clips and `report.txt`."""
    rows = listing.rows
    for split in dict.fromkeys(row.split for row in rows):
        samples = [
            sample(row, data_root)
            for row in rows
            if row.split == split and row.clip is not None and not (checked and row.fault)
        ]
        write_json(output / f"{split}.json", samples)
    missing = [row for row in rows if row.clip is None]
    write_lines(output / "missing.txt", [f"{row.name}\t{row.split}" for row in missing])
    silent = [relative(row.clip, data_root) for row in rows if row.has_sound is False]
    write_lines(output / "without_sound.txt", silent)
    bad = [f"{relative(row.clip, data_root)}\t{row.fault}" for row in rows if row.fault]
    if checked:
        write_lines(output / "bad_media.txt", bad)
        listing.notes.append(f"{len(bad)} clips cannot be read, and are left out: see bad_media.txt")
    elif bad:
        listing.notes.append(f"{len(bad)} clips cannot be opened, but stay in the lists: run again with --check-media")
    if missing:
        listing.notes.append(f"{len(missing)} listed clips are not on disk, and are left out: see missing.txt")
    text = render_report(listing, checked)
    write_lines(output / "report.txt", text.split("\n"))
    return text


def sample(row, data_root):
    return {
        "video": relative(row.clip, data_root),
        "conversations": [
            {"from": "human", "value": f"<video>\n<audio>\n{row.question}"},
            {"from": "gpt", "value": row.answer or row.label},
        ],
    }


def relative(path, data_root):
    return Path(os.path.relpath(path, data_root)).as_posix()


def render_report(listing, checked):
    """The counts by split and class as a table of text, with the published ones and the differences beside them."""
    splits = list(dict.fromkeys(row.split for row in listing.rows))
    groups = [(split, [row for row in listing.rows if row.split == split]) for split in splits]
    if len(splits) > 1:
        groups.append(("+".join(splits), listing.rows))
    head = ("split", "class", "listed", "published", "difference", "missing", "unreadable", "no sound", "written")
    table = [head]
    for split, rows in groups:
        published = {label: count for (where, label), count in listing.published.items() if where == split}
        classes = sorted({row.label for row in rows} | published.keys() - {"all"})
        for label in [*classes, "all"]:
            some = [row for row in rows if label in (row.label, "all")]
            expected = published.get(label)
            written = sum(row.clip is not None and not (checked and row.fault) for row in some)
            table.append(
                (
                    split,
                    label,
                    len(some),
                    "-" if expected is None else expected,
                    "-" if expected is None else f"{len(some) - expected:+d}",
                    sum(row.clip is None for row in some),
                    sum(row.fault is not None for row in some),
                    sum(row.has_sound is False for row in some),
                    written,
                )
            )
    return "\n".join([listing.title, "", *align(table), "", *listing.notes])


def align(table):
    widths = [max(len(str(row[column])) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            str(cell).ljust(width) if column < 2 else str(cell).rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def compare(count, published):
    return str(count) if published is None else f"{count} (published {published}, difference {count - published:+d})"


def listed(names):
    return f": {shorten(names)}" if names else ""


def shorten(names, most=10):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_json(path, samples):
    write_lines(path, [json.dumps(samples, ensure_ascii=False, indent=1)])


def write_lines(path, lines):
    """Writes lines of text through a file beside it, so that a kill leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        raise HumanOmniError(f"--output {path} cannot be written ({error.strerror}); choose another place") from error
    finally:
        beside.unlink(missing_ok=True)


# --- merge ----------------------------------------------------------------------------------------------------------


def merge(args):
    """Joins lists, drops clips that came before, draws and shuffles by the seed; returns a report."""
    generator = random.Random(args.seed)
    inputs = dict(name_and_path(text) for text in args.lists)
    if len(inputs) < len(args.lists):
        raise HumanOmniError(f"two of the lists {' '.join(args.lists)} have one name; write another NAME=LIST.json")
    takes = dict(name_and_count(text, inputs) for text in args.take)
    merged, answers, report = [], {}, []
    for name, path in inputs.items():
        fresh, repeated, contradicting = [], 0, 0
        samples = read_samples(path)
        for entry in samples:
            video = os.path.normpath(entry["video"]) if "video" in entry else object()  # without one: never repeated
            answer = entry["conversations"][-1]["value"]
            if video in answers:
                repeated += 1
                contradicting += answers[video] != answer
            else:
                fresh.append(entry)
                answers[video] = answer
        taken = fresh
        if name in takes:
            if takes[name] > len(fresh):
                raise HumanOmniError(f"--take {name}={takes[name]} asks for more than the {len(fresh)} in {path}")
            taken = generator.sample(fresh, takes[name])
        merged += taken
        report.append(
            f"{name}: {len(samples)} samples, {repeated} left out as repeated ({contradicting} of them with another "
            f"answer), {len(taken)} taken"
        )
    generator.shuffle(merged)
    merged = merged[: args.limit]
    write_json(args.output, merged)
    counts = Counter(parse_answer(entry["conversations"][-1]["value"]) for entry in merged)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    report += [f"{args.output}: {len(merged)} samples, seed {args.seed}"]
    report += [f"  {count} {label[:60]}" for label, count in by_count[:20]]
    return "\n".join(report)


def name_and_path(text):
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and "/" not in name else (text, Path(text))


def name_and_count(text, inputs):
    name, _, count = text.rpartition("=")
    if name not in inputs or not count.isdecimal() or int(count) < 1:
        raise HumanOmniError(f"--take {text!r} is not NAME=N with a NAME among {', '.join(inputs)}")
    return name, int(count)


def read_samples(path):
    """Reads a list of samples, JSON or JSONL; raises `HumanOmniError` naming the first sample that is not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            samples = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            samples = json.loads(text)
    except (OSError, ValueError) as error:
        raise HumanOmniError(
            f"list {path} cannot be read ({' '.join(str(error).split())}); give a .json or .jsonl list"
        ) from error
    if not isinstance(samples, list):
        raise HumanOmniError(f"{path} is not a list; give a JSON list of samples")
    for number, entry in enumerate(samples):
        if not is_sample(entry):
            raise HumanOmniError(
                f"{path} entry {number} is not a sample; it needs 'conversations' of texts, human first, then gpt"
            )
    return samples


def is_sample(entry):
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    return (
        isinstance(turns, list)
        and len(turns) >= 2
        and all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        and [turn.get("from") for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        and isinstance(entry.get("video", ""), str)
    )


if __name__ == "__main__":
    sys.exit(main())
