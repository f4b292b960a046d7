"""Runs the frozen towers once over a data set and keeps what they see: training then needs neither towers nor clips.

    python -m open_r1.cache_features --model_path MODEL --data LIST --out DIR
    torchrun --nproc_per_node 8 -m open_r1.cache_features ...        (every process encodes its part)

A cache is a folder: `manifest.json` says which towers made it and how clips were sampled, `features-*.safetensors` are
the shards, whose headers list their entries, and `bad_clips.jsonl` names the clips that do not read. A shard appears
whole or not at all, and under a name of its own, so a killed process loses at most one, a restart encodes what is
missing, and runs may share a folder.

An entry is one `View`: the picture or the sound of a clip, or of a part of it. It is found by the path as the sample
writes it, and belongs to the file's size and modification time. A clip that is no longer on disk is served from the
cache all the same: that is how raw clips can be deleted. In the same way, weights of a tower that are no longer on
disk are not compared, its configuration still is.

Shapes: N videos, I images, S sounds, T frames, P patches, D tower width, A audio tokens.
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import av
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from humanomni.errors import HumanOmniError, MediaError, exit_status
from humanomni.loading import DTYPES, resolve_device, resolve_dtype
from humanomni.processing import HumanOmniProcessor
from humanomni.prompts import MODAL_TAGS
from humanomni.towers import load_audio_tower, load_vision_tower
from open_r1.data import PROMPT_STYLES, Sample, SampleEncoder, clip_path, read_samples

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
BAD_CLIPS = "bad_clips.jsonl"
STORED_DTYPES = ("float16", "bfloat16", "float32")
TOWER_FIELDS = ("mm_vision_tower", "mm_audio_tower")
# What config files say about the library that wrote them, which changes nothing in the features.
WRITER_FIELDS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
WRITER_FIELDS |= {"processor_class", "image_processor_type", "feature_extractor_type"}
WEIGHT_SAMPLE = 4096  # bytes of each tensor that go into a tower's fingerprint: training a tensor changes all of it
ANOTHER = "make another cache with python -m open_r1.cache_features --out"
ABANDONED_SECONDS = 3600  # an unfinished shard this old belongs to a run that was killed


class CacheError(HumanOmniError):
    """A feature cache is foreign, stale, incomplete or damaged; names what differs and how to mend it."""


@dataclass(frozen=True)
class View:
    """What one tower sees of one clip. `kind` is `video`, `image` or `audio`; `path` is as in the sample."""

    kind: str
    path: str
    start: float | None = None
    end: float | None = None

    def __str__(self) -> str:
        span = "" if self.start is None and self.end is None else f" (start={self.start}, end={self.end})"
        return f"the {self.kind} features of {self.path}{span}"


@dataclass(frozen=True)
class Stamp:
    """A file's state when it was encoded; of a folder of frames, the sum of sizes and the latest time."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        """None where nothing is at `path`."""
        try:
            files = [path, *path.iterdir()] if path.is_dir() else [path]
            states = [file.stat() for file in files]
        except FileNotFoundError:
            return None
        return cls(sum(state.st_size for state in states), max(state.st_mtime_ns for state in states))


@dataclass(frozen=True)
class Entry:
    """Where a view's features lie: tensor `name` of `shard`."""

    shard: str
    name: str
    stamp: Stamp


@dataclass(frozen=True)
class CachedFeatures:
    """The towers' outputs for one clip, None where the modal does not show it; read from disk when first touched."""

    video: torch.Tensor | None = None  # (T, P, D)
    image: torch.Tensor | None = None  # (1, P, D)
    audio: torch.Tensor | None = None  # (A, D)


def views_of(sample: Sample, modal: str) -> list[View]:
    """What the towers see of a sample that is shown as `modal`."""
    paths = {
        "video": ("<video>", sample.video),
        "image": ("<image>", sample.image),
        "audio": ("<audio>", sample.audio or sample.video),
    }
    return [
        View(kind, Path(path).as_posix(), sample.start, sample.end)
        for kind, (tag, path) in paths.items()
        if tag in MODAL_TAGS[modal]
    ]


# ---------------------------------------------------------------------------------------- which cache fits which model


def describe(processor: HumanOmniProcessor) -> dict:
    """What the features depend on besides the clips, from the tower folders' small files and weight headers."""
    config = processor.config
    return {
        "format": FORMAT,
        "num_frames": processor.num_frames,
        "image_aspect_ratio": config.image_aspect_ratio or "square",
        "mm_vision_select_layer": config.mm_vision_select_layer,
        **{name: fingerprint(Path(getattr(config, name))) for name in TOWER_FIELDS},
    }


def fingerprint(folder: Path) -> dict[str, str | None]:
    """A tower's identity: digests of its configuration and of its weights (None where the folder holds none)."""
    settings = {}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            fields = json.loads((folder / name).read_text("utf-8"))
            settings[name] = {key: value for key, value in fields.items() if key not in WRITER_FIELDS}
    return {"folder": str(folder), "config": _digest(settings), "weights": _weights_digest(folder)}


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _weights_digest(folder: Path) -> str | None:
    """Of the files that transformers would load: header and the start of every tensor, without loading any."""
    files = [folder / "model.safetensors"]
    if not files[0].exists():
        files = sorted(folder.glob("model-*.safetensors"))
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            total.update(header)
            tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            for name in sorted(tensors):
                begin, end = tensors[name]["data_offsets"]
                file.seek(8 + length + begin)
                total.update(file.read(min(end - begin, WEIGHT_SAMPLE)))
    pickled = [] if files else sorted(folder.glob("pytorch_model*.bin"))
    for path in pickled:
        with open(path, "rb") as file:  # a zip archive: its end lists the checksum of every tensor
            file.seek(max(path.stat().st_size - 2**20, 0))
            total.update(file.read())
    return total.hexdigest()[:16] if files or pickled else None


def _identity(manifest: dict) -> str:
    """One digest of a manifest, which its shards repeat; where folders lie does not matter."""
    towers = {name: {**manifest[name], "folder": None} for name in TOWER_FIELDS}
    return _digest({**manifest, **towers})


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        known = manifest["format"] == FORMAT
        if known:
            _identity(manifest)
            _ = DTYPES[manifest["dtype"]]
    except FileNotFoundError:
        raise CacheError(
            f"{folder} is no feature cache: it holds no {MANIFEST}; make one with python -m open_r1.cache_features "
            f"--out {folder}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CacheError(
            f"{folder / MANIFEST} does not read ({error!r}); remove {folder} and make it again"
        ) from error
    if not known:
        raise CacheError(
            f"feature cache {folder} was made with format {manifest['format']!r}, not {FORMAT!r}; {ANOTHER}"
        )
    return manifest


def _check_manifest(folder: Path, found: dict, wanted: dict) -> None:
    """Raises CacheError, with name and both values, where the cache `folder` was made in another way than `wanted`."""
    for name, value in wanted.items():
        if name not in TOWER_FIELDS:
            if found.get(name) != value:
                raise CacheError(
                    f"feature cache {folder} was made with {name} {found.get(name)!r}, not {value!r}; {ANOTHER}"
                )
            continue
        for part in ("config", "weights"):
            if value[part] is None and part == "weights":
                logger.warning("%s %s holds no weights: not compared with %s", name, value["folder"], folder)
            elif found[name].get(part) != value[part]:
                raise CacheError(
                    f"feature cache {folder} was made with another {name}: {found[name].get('folder')} "
                    f"({part} {found[name].get(part)}), not {value['folder']} ({part} {value[part]}); {ANOTHER}"
                )


# ----------------------------------------------------------------------------------------------------- reading a cache


def read_index(folder: Path, manifest: dict) -> dict[View, list[Entry]]:
    """The entries of all shards, from their headers; several for a view whose file changed between runs.

    Raises:
        CacheError: a shard is damaged or comes from another cache.
    """
    index: dict[View, list[Entry]] = {}
    for shard in sorted(folder.glob("features-*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
        try:
            with safe_open(shard, "pt") as file:
                header = file.metadata()
            entries, made_by = json.loads(header["entries"]), header["manifest"]
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise CacheError(f"{shard} is damaged ({error}); remove it and run the same command again") from error
        if made_by != _identity(manifest):
            raise CacheError(f"{shard} comes from another cache than {folder / MANIFEST} describes; remove it")
        for name, fields in entries.items():
            entry = Entry(shard.name, name, Stamp(**fields["stamp"]))
            index.setdefault(View(**fields["view"]), []).append(entry)
    return index


def read_bad_clips(folder: Path) -> dict[View, tuple[Stamp | None, str]]:
    """The views that could not be read: the state of their files then, and why."""
    file, bad = folder / BAD_CLIPS, {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        with suppress(ValueError):  # a line that a killed run left unfinished
            fields = json.loads(line)
            stamp = fields["stamp"] and Stamp(**fields["stamp"])
            bad[View(**fields["view"])] = (stamp, fields["reason"])
    return bad


class FeatureCache:
    """A cache opened for training; give it to `SupervisedCollator(feature_cache=...)`.

    Holds an index in memory and no open file, so it can be pickled to data-loader workers.

    Args:
        folder: what `python -m open_r1.cache_features --out` wrote.
        processor: of the model to train; the cache must have been made with its towers and sampling.
        data_folder: where relative clip paths start.

    Raises:
        CacheError: there is no cache, it is damaged, or it is foreign: made with other towers, another hidden layer,
            other sampling or another version of this format.
    """

    def __init__(self, folder: str | os.PathLike, processor: HumanOmniProcessor, data_folder: str | os.PathLike = ""):
        self.folder = Path(folder).expanduser()
        self.data_folder = data_folder
        manifest = _read_manifest(self.folder)
        _check_manifest(self.folder, manifest, describe(processor))
        self.index = read_index(self.folder, manifest)
        self.bad_clips = read_bad_clips(self.folder)
        self.dtype = DTYPES[manifest["dtype"]]
        config = processor.config
        patches, width = config.patch_grid**2, config.mm_hidden_size
        self.shapes = {
            "video": (processor.num_frames, patches, width),
            "image": (1, patches, width),
            "audio": (config.tokens_per_audio, config.audio_hidden_size),
        }
        self.model_path = config._name_or_path

    def get(self, sample: Sample, modal: str) -> CachedFeatures:
        """The features of a sample that is shown as `modal`.

        Raises:
            CacheError: the clip is not in the cache, or its file has changed since.
            MediaError: the clip could not be read when the cache was made.
        """
        found = self.find(sample, modal)
        return CachedFeatures(**{kind: self._read(entry) for kind, entry in found.items()})

    def find(self, sample: Sample, modal: str) -> dict[str, Entry]:
        """Where those features lie, by kind; raises as `get` does, but reads nothing."""
        return {view.kind: self._find(view, sample) for view in views_of(sample, modal)}

    def check(self, sample: Sample, modal: str) -> None:
        """Raises CacheError before training rather than in its midst; a clip known to be bad is told there."""
        with suppress(MediaError):
            self.find(sample, modal)

    def _find(self, view: View, sample: Sample) -> Entry:
        entries = self.index.get(view, [])
        path = clip_path(view.path, self.data_folder)
        stamp = Stamp.of(path)
        for entry in reversed(entries):
            if stamp is None or entry.stamp == stamp:
                return entry
        if view in self.bad_clips and self.bad_clips[view][0] == stamp:
            raise MediaError(f"{self.bad_clips[view][1]} (noted in {self.folder / BAD_CLIPS})")
        told = f"are not in the feature cache {self.folder}"
        if entries:
            told = (
                f"are stale in the feature cache {self.folder}: the file changed from {entries[-1].stamp} to {stamp}"
            )
        options = ["--model_path", self.model_path, "--data", "LIST", "--out", self.folder]
        options += ["--data_folder", self.data_folder] if str(self.data_folder) else []
        command = shlex.join(map(str, ["python", "-m", "open_r1.cache_features", *options]))
        raise CacheError(f"{sample.origin}: {view} {told}; add them with {command}")

    def _read(self, entry: Entry) -> torch.Tensor:
        """The entry's tensor, mapped into memory."""
        shard = self.folder / entry.shard
        try:
            with safe_open(shard, "pt") as file:
                return file.get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{shard} does not read any more ({error}); run open_r1.cache_features again") from error

    def blank(self, modal: str) -> CachedFeatures:
        """Zeros in the shapes of `modal`'s features."""
        kinds = [tag.strip("<>") for tag in MODAL_TAGS[modal]]
        return CachedFeatures(**{kind: torch.zeros(self.shapes[kind], dtype=self.dtype) for kind in kinds})

    def stack(self, clips: list[CachedFeatures]) -> dict[str, torch.Tensor]:
        """A batch's features, row by row, under the model's names, those that no clip has left out.

        Returns:
            Of `video_features` (N, T, P, D), `image_features` (I, 1, P, D) and `audio_features` (S, A, D) those that
            some clip has, in the cache's data type; the model casts them.
        """
        columns = {
            "video_features": [clip.video for clip in clips if clip.video is not None],
            "image_features": [clip.image for clip in clips if clip.image is not None],
            "audio_features": [clip.audio for clip in clips if clip.audio is not None],
        }
        return {name: torch.stack(tensors) for name, tensors in columns.items() if tensors}


# ------------------------------------------------------------------------------------------------------ making a cache


@dataclass
class Clip:
    """One file, or a part of one, and the views of it to encode."""

    path: Path
    views: list[View]
    stamp: Stamp | None
    media: dict[View, torch.Tensor] = field(default_factory=dict)
    faults: dict[View, MediaError] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class CacheReport:
    """What a run did; `str()` is for people."""

    clips: int
    encoded: int = 0
    present: int = 0
    seconds: float = 0.0
    bytes: int = 0
    bad: list[str] = field(default_factory=list)
    took: float = 0.0

    def __str__(self) -> str:
        hours = f" ({self.seconds / 3600:.2f} hours)" if self.seconds else ""
        summary = (
            f"{self.clips} clips: {self.encoded} encoded{hours} in {self.took:.1f} seconds, {self.bytes / 1e6:.1f} MB "
            f"written; {self.present} were there; {len(self.bad)} do not read"
        )
        return "\n  ".join([summary, *self.bad])


def cache_features(
    samples: Iterable[Sample],
    processor: HumanOmniProcessor,
    folder: str | os.PathLike,
    *,
    data_folder: str | os.PathLike = "",
    prompt_style: str = "inference",
    dtype: str = "float16",
    device: str | torch.device = "auto",
    batch_size: int = 8,
    num_workers: int = 4,
    shard_size: int = 64,
    on_bad_sample: str = "error",
    rank: int = 0,
    world_size: int = 1,
) -> CacheReport:
    """Encodes what the cache `folder` lacks of the samples' clips, each once, however many samples show it.

    Args:
        prompt_style: decides, as in training, whether a video's sound is heard where only its picture is tagged.
        dtype: of the stored features, one of `STORED_DTYPES`; the towers run in what suits `device`.
        batch_size: clips that go through the towers at once.
        num_workers: threads that decode clips, ahead of the towers.
        shard_size: clips in one file.
        on_bad_sample: `error` stops at a clip that does not read, `skip` notes it and goes on.
        rank, world_size: which part of the clips is this process's.

    Raises:
        CacheError: the folder holds a cache made in another way, or features do not fit `dtype`.
        MediaError: a clip does not read (with `error`).
    """
    started = time.monotonic()
    folder = Path(folder).expanduser()
    manifest = _settle_manifest(folder, {**_with_weights(describe(processor)), "dtype": dtype})
    clips = distinct_clips(samples, SampleEncoder(processor, prompt_style), data_folder)[rank::world_size]
    missing = _missing(clips, read_index(folder, manifest))
    report = CacheReport(len(clips), present=len(clips) - len(missing))
    known_bad = read_bad_clips(folder)
    writer = ShardWriter(folder, manifest, shard_size)
    towers = Towers(processor, resolve_device(device))
    pool = ThreadPoolExecutor(num_workers)
    progress = tqdm(desc="encoding", total=len(missing), unit="clip", disable=rank > 0 or not missing)
    try:
        decoded = _decoded_ahead(pool, missing, processor, ahead=2 * batch_size + num_workers)
        while batch := list(islice(decoded, batch_size)):
            writer.add(batch, towers.encode(batch))
            for clip in batch:
                _note_faults(folder, clip, known_bad)
                if clip.faults:
                    report.bad.append("; ".join(dict.fromkeys(map(str, clip.faults.values()))))
            progress.update(len(batch))
            if report.bad and on_bad_sample == "error":
                raise MediaError(f"{report.bad[0]}; pass --on_bad_sample skip to go on without it")
            report.encoded += sum(bool(clip.media) for clip in batch)
            report.seconds += sum(clip.seconds for clip in batch)
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)
        writer.flush()
    report.bytes, report.took = writer.bytes, time.monotonic() - started
    return report


def _settle_manifest(folder: Path, manifest: dict) -> dict:
    """Writes the manifest of a new cache, or checks that an existing one is made in the same way; returns it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            draft = folder / f".{MANIFEST}.{uuid.uuid4().hex}"
            draft.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
            os.replace(draft, folder / MANIFEST)
        for draft in folder.glob(".features-*"):
            with suppress(FileNotFoundError):  # another process may have removed it
                if time.time() - draft.stat().st_mtime > ABANDONED_SECONDS:
                    draft.unlink()
    except OSError as error:
        raise CacheError(f"the cache folder {folder} cannot be written ({error}); mend --out") from error
    found = _read_manifest(folder)
    _check_manifest(folder, found, manifest)
    return found


def _with_weights(manifest: dict) -> dict:
    """`manifest`, or CacheError where a tower has no weights to encode with."""
    for name in TOWER_FIELDS:
        if manifest[name]["weights"] is None:
            raise CacheError(f"{name} {manifest[name]['folder']} holds no weights; run scripts/download_models.sh")
    return manifest


def distinct_clips(samples: Iterable[Sample], encoder: SampleEncoder, data_folder: str | os.PathLike) -> list[Clip]:
    """The clips that the samples show, each once, with all that any sample shows of them."""
    views: dict[View, None] = {}
    for sample in samples:
        views |= dict.fromkeys(views_of(sample, encoder(sample).modal))
    clips: dict[tuple, Clip] = {}
    for view in views:
        path = clip_path(view.path, data_folder)
        clips.setdefault((view.path, view.start, view.end), Clip(path, [], None)).views.append(view)
    return list(clips.values())


def _missing(clips: list[Clip], index: dict[View, list[Entry]]) -> list[Clip]:
    """The clips of which a view is not in the cache, with those views."""
    missing = []
    for clip in clips:
        stamp = Stamp.of(clip.path)
        lacking = [
            view
            for view in clip.views
            if not any(stamp is None or entry.stamp == stamp for entry in index.get(view, []))
        ]
        if lacking:
            missing.append(Clip(clip.path, lacking, stamp))
    return missing


def _decoded_ahead(pool: ThreadPoolExecutor, clips: list[Clip], processor, ahead: int) -> Iterator[Clip]:
    """The clips in order, decoded in the pool, never more than `ahead` of them in memory."""
    pending, waiting = deque(), iter(clips)
    while True:
        while len(pending) < ahead and (clip := next(waiting, None)) is not None:
            pending.append(pool.submit(_decode, clip, processor))
        if not pending:
            return
        yield pending.popleft().result()


def _decode(clip: Clip, processor: HumanOmniProcessor) -> Clip:
    """Fills `clip.media` with the towers' input, and `clip.faults` with what does not read."""
    aspect = processor.config.image_aspect_ratio or "square"
    clip.stamp = Stamp.of(clip.path)
    for view in clip.views:
        try:
            media = processor.load_media(
                clip.path, view.kind, start=view.start, end=view.end, image_aspect_ratio=aspect
            )
        except MediaError as error:
            clip.faults[view] = error
        else:
            clip.media[view] = {"video": media.frames, "image": media.image, "audio": media.audio}[view.kind]
    if clip.media:
        clip.seconds = _seconds(clip.path, clip.views[0])
    return clip


def _seconds(path: Path, view: View) -> float:
    """How long the clip is, 0 where that is not known (an image, a folder, a container that does not say)."""
    if view.kind == "image" or path.is_dir():
        return 0.0
    with suppress(av.error.FFmpegError), av.open(str(path)) as container:
        whole = (container.duration or 0) / av.time_base
        return max(min(whole, view.end or whole) - (view.start or 0), 0.0)
    return 0.0


def _note_faults(folder: Path, clip: Clip, known: dict[View, tuple[Stamp | None, str]]) -> None:
    """Appends the clip's faults to the list of bad clips, unless they stand there already."""
    for view, error in clip.faults.items():
        if known.get(view) != (clip.stamp, str(error)):
            stamp = clip.stamp and asdict(clip.stamp)
            line = json.dumps({"view": asdict(view), "stamp": stamp, "reason": str(error)}, ensure_ascii=False)
            with open(folder / BAD_CLIPS, "a", encoding="utf-8") as file:
                file.write(line + "\n")


class Towers:
    """The two frozen encoders, each loaded when it first has something to see."""

    def __init__(self, processor: HumanOmniProcessor, device: torch.device):
        self.config = processor.config
        self.device = device
        self.dtype = resolve_dtype("auto", device)
        self.loaded: dict[str, torch.nn.Module] = {}

    @torch.inference_mode()
    def encode(self, clips: Iterable[Clip]) -> dict[View, torch.Tensor]:
        """The features of every view that was decoded, as `HumanOmniModel.encode` gives them, on the CPU."""
        features: dict[View, torch.Tensor] = {}
        for kind in ("video", "image", "audio"):
            inputs = {view: media for clip in clips for view, media in clip.media.items() if view.kind == kind}
            if inputs:
                stacked = torch.stack(list(inputs.values())).to(self.device)
                tower = self._tower("audio" if kind == "audio" else "vision")
                outputs = tower(stacked[:, None] if kind == "image" else stacked).cpu()
                features |= dict(zip(inputs, outputs, strict=True))
        return features

    def _tower(self, name: str) -> torch.nn.Module:
        if name not in self.loaded:
            load = {"vision": load_vision_tower, "audio": load_audio_tower}[name]
            self.loaded[name] = load(self.config, self.dtype).to(self.device)
        return self.loaded[name]


class ShardWriter:
    """Gathers features and writes them as a shard whenever `shard_size` clips are together."""

    def __init__(self, folder: Path, manifest: dict, shard_size: int):
        self.folder, self.manifest, self.shard_size = folder, manifest, shard_size
        self.dtype = DTYPES[manifest["dtype"]]
        self.tensors: dict[str, torch.Tensor] = {}
        self.entries: dict[str, dict] = {}
        self.clips = self.bytes = 0

    def add(self, clips: Iterable[Clip], features: dict[View, torch.Tensor]) -> None:
        for clip in clips:
            for view in clip.media:
                stored = features[view].to(self.dtype, copy=True, memory_format=torch.contiguous_format)
                if not stored.isfinite().all():
                    raise CacheError(f"{view} are not finite in {self.manifest['dtype']}; pass --dtype bfloat16")
                name = f"{view.kind}_features.{len(self.tensors)}"
                self.tensors[name] = stored
                self.entries[name] = {"view": asdict(view), "stamp": asdict(clip.stamp)}
            self.clips += bool(clip.media)
            if self.clips >= self.shard_size:
                self.flush()

    def flush(self) -> None:
        """Writes what is gathered: under a hidden name first, so that a shard with its proper name is always whole."""
        if not self.tensors:
            return
        name = f"features-{uuid.uuid4().hex}.safetensors"
        draft = self.folder / f".{name}"
        try:
            save_file(self.tensors, draft, {"entries": json.dumps(self.entries), "manifest": _identity(self.manifest)})
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            self.bytes += draft.stat().st_size
            os.replace(draft, self.folder / name)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise CacheError(
                f"a shard of {self.folder} cannot be written ({error}); make room and run again"
            ) from error
        self.tensors, self.entries, self.clips = {}, {}, 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for a mistake of the user's."""
    args = parse_arguments(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if device == "auto" and torch.cuda.device_count() > 1:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"

    def program() -> None:
        processor = HumanOmniProcessor.from_pretrained(
            args.model_path, vision_tower=args.vision_tower, audio_tower=args.audio_tower, bert_model=args.bert_model
        )
        report = cache_features(
            read_samples(args.data, args.seed),
            processor,
            args.out,
            data_folder=args.data_folder,
            prompt_style=args.prompt_style,
            dtype=args.dtype,
            device=device,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            shard_size=args.shard_size,
            on_bad_sample=args.on_bad_sample,
            rank=rank,
            world_size=world_size,
        )
        print(report if world_size == 1 else f"process {rank} of {world_size}: {report}")

    return exit_status(program)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"{number} is not at least 1")
        return number

    parser = argparse.ArgumentParser(prog="python -m open_r1.cache_features", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_path", required=True, help="the checkpoint that training starts from; only its towers are loaded")
    add("--data", required=True, help="samples: a JSON list, a JSONL file or a YAML mixture")
    add("--out", required=True, help="folder of the cache; may exist, then what is missing is added")
    add("--data_folder", default="", help="where relative clip paths start")
    add("--vision_tower", help="folder or cached hub id, in place of config.json's mm_vision_tower")
    add("--audio_tower", help="the same for mm_audio_tower")
    add("--bert_model", help="the same for mm_bert")
    add("--prompt_style", choices=PROMPT_STYLES, default="inference", help="as in training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of a mixture's random:N, as in training (default: %(default)s)")
    add("--dtype", choices=STORED_DTYPES, default="float16", help="of the stored features (default: %(default)s)")
    add("--device", default="auto", help="auto (one GPU for each process), cpu, cuda:N (default: %(default)s)")
    add("--batch_size", type=positive, default=8, help="clips encoded at once (default: %(default)s)")
    add("--num_workers", type=positive, default=4, help="threads that decode clips (default: %(default)s)")
    add("--shard_size", type=positive, default=64, help="clips in one file (default: %(default)s)")
    add("--on_bad_sample", choices=("error", "skip"), default="error", help="what an unreadable clip does")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
