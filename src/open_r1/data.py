"""Training samples: read, validated, counted, turned into token ids with labels, and collated with their media.

Shapes: B rows, L sequence. A row's labels are -100 on everything but the assistant's turns.
"""

import json
import logging
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from humanomni.errors import HumanOmniError, MediaError
from humanomni.media import clip_seconds
from humanomni.processing import HumanOmniProcessor, Media, stack_media
from humanomni.prompts import (
    MEDIA_TAGS,
    MODAL_TAGS,
    THINK_SENTENCE,
    inference_turn,
    release_sft_query,
    release_sft_turn,
    wrap_tags,
)
from open_r1.metrics import parse_answer

logger = logging.getLogger(__name__)

IGNORED = -100
RELEASE_GRPO_FRAMES = 8
PROMPT_STYLES = ("inference", "release")
ROLES = {"human": "user", "gpt": "assistant"}
MEDIA_FIELDS = ("video", "image", "audio")


class DataError(HumanOmniError):
    """A sample, a sample file or a mixture is not what the format asks; names file, index and field."""


@dataclass(frozen=True)
class Sample:
    """One conversation about at most one clip (a video with its sound, an image, or a sound of its own).

    `turns` alternates the user's and the assistant's texts, the user's first; media tags stand in the first one only.
    `origin` says where the sample was read, for messages.
    """

    turns: tuple[str, ...]
    video: str | None = None
    image: str | None = None
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    origin: str = "sample"

    @classmethod
    def parse(cls, fields: dict, origin: str = "sample") -> "Sample":
        """Checks one entry of a sample file.

        Args:
            fields: `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and at most one clip as
                `video`, `image` or `audio` (an `audio` beside a `video` replaces the video's own sound), with optional
                `start` and `end` in seconds.

        Raises:
            DataError: one line that names `origin` and the field.
        """

        def fail(name: str, told: str):
            raise DataError(f"{origin}, field {name}: {told}")

        if not isinstance(fields, dict):
            fail("(all)", f"is a {type(fields).__name__}, not an object with conversations and a clip")
        media = {}
        for name in MEDIA_FIELDS:
            media[name] = fields.get(name)
            if media[name] is not None and (not isinstance(media[name], str) or not media[name].strip()):
                fail(name, f"is {media[name]!r}, not the path of a file")
        for name in ("start", "end"):
            if not isinstance(fields.get(name), (int, float, type(None))):
                fail(name, f"is {fields[name]!r}, not a number of seconds")

        conversations = fields.get("conversations")
        if not isinstance(conversations, list) or not conversations:
            fail("conversations", "is not a list of turns")
        for index, turn in enumerate(conversations):
            place = f"conversations[{index}]"
            if not isinstance(turn, dict) or turn.get("from") not in ROLES:
                fail(f"{place}.from", f"is not one of {', '.join(ROLES)}")
            if not isinstance(turn.get("value"), str):
                fail(f"{place}.value", f"is {turn.get('value')!r}, not a text")
        if conversations[0]["from"] == "gpt":  # as the release does: a leading answer has no question
            conversations = conversations[1:]
        if not conversations or len(conversations) % 2:
            fail("conversations", f"has {len(conversations)} turns; a human turn needs its gpt turn")
        for index, turn in enumerate(conversations):
            if turn["from"] != ("human", "gpt")[index % 2]:
                fail("conversations", "does not alternate human and gpt")
            tagged = any(tag in turn["value"] for tag in MEDIA_TAGS)
            if tagged and index:
                fail("conversations", f"has a media tag in turn {index}; tags belong in the first human turn")
        _check_tags(conversations[0]["value"], media, fail)
        return cls(
            tuple(turn["value"] for turn in conversations),
            **media,
            start=fields.get("start"),
            end=fields.get("end"),
            origin=origin,
        )

    @property
    def clip(self) -> str | None:
        """The path of the sample's clip, or None for text alone."""
        return self.video or self.image or self.audio

    @property
    def answer(self) -> str:
        """The label: what stands in `<answer>` of the last turn, or the whole turn."""
        return parse_answer(self.turns[-1])


def _check_tags(text: str, media: dict[str, str | None], fail) -> None:
    """The tags of the first human turn and the sample's clip must speak of the same media."""
    for tag in MEDIA_TAGS:
        if text.count(tag) > 1:
            fail("conversations", f"has {tag} more than once; a sample holds one clip")
    provided = {
        "<video>": media["video"],
        "<audio>": media["audio"] or media["video"],
        "<image>": media["image"],
    }
    for tag, path in provided.items():
        if tag in text and path is None:
            fail(tag.strip("<>"), f"is missing, but the first human turn holds {tag}")
    for name, path in media.items():
        if path is not None and not any(tag in text and provided[tag] == path for tag in MEDIA_TAGS):
            fail("conversations", f"holds no media tag for the {name} {path!r}; start it with <{name}>")
    if "<image>" in text and ("<video>" in text or "<audio>" in text):
        fail("conversations", "mixes <image> with other media")


def read_samples(path: str | os.PathLike, seed: int = 0) -> list[Sample]:
    """Reads a JSON list, a JSONL file or a YAML mixture of those.

    A mixture is `datasets: [{json_path: ..., sampling_strategy: all | first:N | end:N | random:N}]`, where N is a
    count or a percentage (`first:10%`); a relative `json_path` is looked up beside the mixture, then in the working
    directory.

    Raises:
        DataError: a file is missing or does not parse, or a sample is not valid.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        samples = []
        for index, part in enumerate(_mixture(path)):
            samples += _sampled(path, index, part, seed)
    else:
        samples = _read_list(path)
    if not samples:
        raise DataError(f"{path} holds no sample")
    return samples


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; pass the list of samples with --data") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} does not read as UTF-8 text: {error}") from error


def _read_list(path: Path) -> list[Sample]:
    text = _read_text(path)
    entries = []
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    else:
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list):
            raise DataError(f"{path} holds a {type(entries).__name__}, not a list of samples")
    return [Sample.parse(entry, f"{path}, sample {index}") for index, entry in enumerate(entries)]


def _mixture(path: Path) -> list[dict]:
    try:
        content = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    parts = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("json_path") for part in parts):
        raise DataError(f"{path} is not a mixture: it needs a list `datasets` of entries with a json_path")
    return parts


def _sampled(mixture: Path, index: int, part: dict, seed: int) -> list[Sample]:
    file = Path(part["json_path"])
    if not file.is_absolute() and (mixture.parent / file).exists():
        file = mixture.parent / file
    samples = _read_list(file)
    strategy = str(part.get("sampling_strategy", "all"))
    kind, _, amount = strategy.partition(":")
    if strategy == "all":
        return samples
    percent = amount.endswith("%")
    number = amount.removesuffix("%")
    if kind not in ("first", "end", "random") or not number.isdigit():
        raise DataError(
            f"{mixture}, datasets[{index}], field sampling_strategy: is {strategy!r}; pass all, first:N, end:N or "
            f"random:N with a count or a percentage"
        )
    count = min(len(samples), -(-len(samples) * int(number) // 100) if percent else int(number))
    if kind == "first":
        return samples[:count]
    if kind == "end":
        return samples[len(samples) - count :]
    chosen = sorted(random.Random(f"{seed}-{index}").sample(range(len(samples)), count))
    return [samples[place] for place in chosen]


@dataclass
class EncodedSample:
    """Token ids with placeholders expanded, the labels for them, and the text for BERT."""

    input_ids: list[int]
    labels: list[int]
    query: str
    modal: str
    media_end: int  # index after the last media token: a row must not be cut before it


class SampleEncoder:
    """Turns a sample's texts into an `EncodedSample`; reads no media."""

    def __init__(self, processor: HumanOmniProcessor, prompt_style: str = "inference"):
        if prompt_style not in PROMPT_STYLES:
            raise DataError(f"prompt_style is {prompt_style!r}; pass one of {', '.join(PROMPT_STYLES)}")
        self.processor = processor
        self.prompt_style = prompt_style

    def __call__(self, sample: Sample) -> EncodedSample:
        turns, query, modal = self._turns(sample)
        messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
        text, spans = self._render(messages, sample)
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        counts = self.processor.placeholder_counts()
        ids, labels, media_end = [], [], 0
        for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in counts:
                ids += [token] * counts[token]
                labels += [IGNORED] * counts[token]
                media_end = len(ids)
            else:
                ids.append(token)
                labels.append(token if any(first <= begin < last for first, last in spans) else IGNORED)
        return EncodedSample(ids, labels, query, modal, media_end)

    def _turns(self, sample: Sample) -> tuple[list[str], str, str]:
        """The turns as the model reads them, the text for BERT, and the modal."""
        first = sample.turns[0]
        use_start_end = self.processor.config.mm_use_x_start_end
        if self.prompt_style == "release":
            if sample.video is not None:
                first = _with_sound(first)
            modal = _modal(first)
            first = wrap_tags(release_sft_turn(first), use_start_end)
            return [first, *sample.turns[1:]], release_sft_query(first), modal
        modal, question = _modal(first), question_of(sample)
        return [inference_turn(question, modal, use_start_end), *sample.turns[1:]], question, modal

    def _render(self, messages: list[dict], sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and where in it the assistant speaks, its end mark included."""

        def render(count: int, prompt: bool) -> str:
            return self.processor.tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )

        text, spans = render(len(messages), False), []
        for index in range(1, len(messages), 2):
            before, after = render(index, True), render(index + 1, False)
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{sample.origin}: the checkpoint's chat template rewrites earlier turns; use one turn"
                )
            spans.append((len(before), len(after)))
        return text, spans


@dataclass
class EncodedPrompt:
    """What the model is asked about a sample, placeholders expanded, without any answer."""

    input_ids: list[int]
    query: str
    modal: str
    num_frames: int  # of a video


def encode_prompt(processor: HumanOmniProcessor, sample: Sample, prompt_style: str = "inference") -> EncodedPrompt:
    """The prompt of a sample's first turn, for reinforcement learning and evaluation.

    The sentence that asks for `<think>` and `<answer>` is added where the question lacks it, behind two spaces, or
    behind a line break in the `release` style, as the released inference and GRPO have it. The released GRPO shows 8
    frames whatever `config.json` says, and so does this style.
    """
    question = question_of(sample)
    if THINK_SENTENCE not in question:
        question += ("\n" if prompt_style == "release" else "  ") + THINK_SENTENCE
    modal = _modal(sample.turns[0])
    style = "release_grpo" if prompt_style == "release" else prompt_style
    text, query = processor.build_prompt(question, modal, style)
    num_frames = RELEASE_GRPO_FRAMES if prompt_style == "release" else processor.num_frames
    counts = processor.placeholder_counts(num_frames)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return EncodedPrompt([token for i in ids for token in [i] * counts.get(i, 1)], query, modal, num_frames)


def question_of(sample: Sample) -> str:
    """The first turn without its media tags."""
    question = sample.turns[0]
    for tag in MEDIA_TAGS:
        question = question.replace(f"{tag}\n", "").replace(tag, "")
    return question.strip()


def _with_sound(text: str) -> str:
    """The released SFT shows a video's sound and picture whichever of the two tags stands alone on its line."""
    if "<audio>" not in text:
        return text.replace("<video>\n", "<video>\n<audio>\n")
    if "<video>" not in text:
        return text.replace("<audio>\n", "<video>\n<audio>\n")
    return text


def _modal(text: str) -> str:
    shown = {tag for tag in MEDIA_TAGS if tag in text}
    return next(modal for modal, tags in MODAL_TAGS.items() if set(tags) == shown)


@dataclass
class LoadedData:
    """Samples that can be trained on, and what was left out; `str()` is the report for people."""

    samples: list[Sample]
    lengths: list[int]
    seconds: float = 0.0
    labels: Counter = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        common = ", ".join(f"{label} {count}" for label, count in self.labels.most_common(12))
        more = f", and {len(self.labels) - 12} more" if len(self.labels) > 12 else ""
        lines = [
            f"{len(self.samples)} samples, {self.seconds / 3600:.2f} hours, "
            f"{min(self.lengths)} to {max(self.lengths)} tokens",
            f"labels: {common}{more}",
        ]
        for told, names in (
            ("clips missing, samples left out", self.missing),
            ("samples too long, left out", self.dropped),
            ("samples too long, text cut", self.truncated),
        ):
            if names:
                lines.append(f"{len(names)} {told}: {names[0]}{', ...' if len(names) > 1 else ''}")
        return "\n".join(lines)


def prepare_samples(
    samples: list[Sample],
    encoder: SampleEncoder,
    *,
    data_folder: str | os.PathLike = "",
    max_length: int | None = None,
    too_long: str = "truncate_text",
    on_bad_sample: str = "error",
    feature_cache=None,
    count_seconds: bool = True,
) -> LoadedData:
    """Checks every sample before training: its clip exists and its tokens fit.

    Args:
        max_length: tokens a row may have, media included; None for any.
        too_long: `truncate_text` cuts the end of the text, never a media token, and drops a row of which no supervised
            token would stay; `drop` leaves such samples out.
        on_bad_sample: `error` stops at a missing clip; `skip` leaves its sample out.
        feature_cache: an `open_r1.cache_features.FeatureCache` that must hold every sample; clips may be gone.
        count_seconds: look how long the clips play, for the report; one process of several is enough.

    Raises:
        DataError: a clip is missing (with `error`), or nothing is left.
        CacheError: the feature cache lacks a sample.
    """
    kept, lengths, report = [], [], LoadedData([], [])
    if too_long not in ("truncate_text", "drop"):
        raise DataError(f"too_long is {too_long!r}; pass truncate_text or drop")
    for sample in samples:
        if feature_cache is None and sample.clip is not None and not clip_path(sample.clip, data_folder).exists():
            if on_bad_sample == "error":
                raise DataError(
                    f"{sample.origin}: the clip {clip_path(sample.clip, data_folder)} does not exist; mend the path, "
                    f"set data_folder, or pass --on_bad_sample skip"
                )
            report.missing.append(sample.clip)
            continue
        encoded = encoder(sample)
        if feature_cache is not None:
            feature_cache.check(sample, encoded.modal)
        length = len(encoded.input_ids)
        if max_length is not None and length > max_length:
            fits = encoded.media_end <= max_length and any(label != IGNORED for label in encoded.labels[:max_length])
            if too_long == "drop" or not fits:
                report.dropped.append(f"{sample.origin} ({length} of {max_length} tokens)")
                continue
            report.truncated.append(f"{sample.origin} ({length} of {max_length} tokens)")
            length = max_length
        kept.append(sample)
        lengths.append(length)
        report.labels[sample.answer] += 1
    if not kept:
        raise DataError(
            f"none of {len(samples)} samples is left: {len(report.missing)} clips are missing, {len(report.dropped)} "
            f"samples are longer than max_length {max_length}"
        )
    report.samples, report.lengths = kept, lengths
    if feature_cache is None and count_seconds:
        report.seconds = total_seconds(kept, data_folder)
    return report


def total_seconds(samples: list[Sample], data_folder: str | os.PathLike = "") -> float:
    """How long the samples' clips play together, as their files say; what does not say, e.g. an image, counts 0."""

    def seconds(clip: str) -> float:
        try:
            return clip_seconds(clip_path(clip, data_folder))
        except MediaError:  # told where the clip is read
            return 0.0

    clips = {sample.video or sample.audio for sample in samples} - {None}
    with ThreadPoolExecutor() as threads:
        lengths = dict(zip(clips, threads.map(seconds, clips), strict=True)) | {None: 0.0}
    total = 0.0
    for sample in samples:
        whole = lengths[sample.video or sample.audio]
        end = whole if sample.end is None else min(sample.end, whole)
        total += max(end - (sample.start or 0.0), 0.0)
    return total


def clip_path(clip: str, data_folder: str | os.PathLike) -> Path:
    """Where a sample's clip lies: under `data_folder` unless its path is absolute."""
    return Path(data_folder).expanduser() / clip


class BadSamples:
    """Remembers, in one file a process, which samples could not be read; data-loader workers append to it too."""

    def __init__(self, folder: str | os.PathLike, rank: int = 0):
        self.file = Path(folder) / f"bad_samples.rank{rank}.jsonl"

    def add(self, sample: Sample, reason: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"sample": sample.origin, "clip": sample.clip, "reason": reason}, ensure_ascii=False)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict]:
        """The samples so far, each once."""
        if not self.file.exists():
            return []
        return list({line: json.loads(line) for line in self.file.read_text("utf-8").splitlines()}.values())


class SupervisedCollator:
    """A list of samples to the batch for `model(**batch).loss`, padded on the right.

    A clip that does not read stops training with its name (`on_bad_sample="error"`), or its row stays in the batch as
    a blank one without labels (`"skip"`): every process then still runs every part of the model, which sharded
    training needs, and nothing is learnt from it.

    Args:
        prompt_style: `inference` asks as inference does; `release` as the released SFT did.
        data_folder: where relative clip paths start.
        max_length: rows are cut there (see `prepare_samples`, which decides which rows may be).
        feature_cache: an `open_r1.cache_features.FeatureCache`; clips are then never opened.
        bad_samples: where skipped samples are noted.
    """

    def __init__(
        self,
        processor: HumanOmniProcessor,
        prompt_style: str = "inference",
        data_folder: str | os.PathLike = "",
        *,
        max_length: int | None = None,
        on_bad_sample: str = "error",
        feature_cache=None,
        bad_samples: BadSamples | None = None,
    ):
        if on_bad_sample not in ("error", "skip"):
            raise DataError(f"on_bad_sample is {on_bad_sample!r}; pass error or skip")
        self.processor = processor
        self.encode = SampleEncoder(processor, prompt_style)
        self.data_folder = data_folder
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.feature_cache = feature_cache
        self.bad_samples = bad_samples

    def __call__(self, samples: list[dict | Sample]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels` (B, L), BERT's input, and media as the processor gives
        them or, with a feature cache, the towers' outputs."""
        rows = [sample_of(sample) for sample in samples]
        encoded = [self.encode(row) for row in rows]
        clips = []
        for row, texts in zip(rows, encoded, strict=True):
            try:
                clips.append(self._media(row, texts.modal))
            except MediaError as error:
                if self.on_bad_sample == "error":
                    raise MediaError(
                        f"{row.origin}: {error}; pass --on_bad_sample skip to go on without it"
                    ) from error
                logger.warning("%s is skipped: %s", row.origin, error)
                if self.bad_samples is not None:
                    self.bad_samples.add(row, str(error))
                clips.append(self._blank(texts.modal))
                texts.labels = [IGNORED] * len(texts.labels)
        input_ids = [texts.input_ids[: self.max_length] for texts in encoded]
        labels = [texts.labels[: self.max_length] for texts in encoded]
        batch = self.processor.pad(input_ids, side="right")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
        batch |= self.processor.tokenize_queries([texts.query for texts in encoded])
        return {**batch, **self._stack(clips)}

    def _media(self, sample: Sample, modal: str):
        if self.feature_cache is not None:
            return self.feature_cache.get(sample, modal)
        return load_sample_media(self.processor, sample, modal, self.data_folder)

    def _blank(self, modal: str):
        """What stands in for a clip that does not read: zeros of the right shape."""
        if self.feature_cache is not None:
            return self.feature_cache.blank(modal)
        return blank_media(self.processor, modal)

    def _stack(self, clips: list) -> dict[str, torch.Tensor]:
        return stack_media(clips) if self.feature_cache is None else self.feature_cache.stack(clips)


def sample_of(row: dict | Sample) -> Sample:
    """A sample, an entry of a sample file, or a dataset's row `{"sample": fields of Sample}`."""
    if isinstance(row, Sample):
        return row
    if "sample" in row:
        return Sample(**{**row["sample"], "turns": tuple(row["sample"]["turns"])})
    return Sample.parse(row)


def load_sample_media(
    processor: HumanOmniProcessor,
    sample: Sample,
    modal: str,
    data_folder: str | os.PathLike,
    num_frames: int | None = None,
) -> Media:
    """Reads a sample's clip as training shows it (padded to a square where `config.json` says so)."""
    options = {
        "start": sample.start,
        "end": sample.end,
        "image_aspect_ratio": processor.config.image_aspect_ratio or "square",
        "num_frames": num_frames,
    }
    if modal == "text":
        return Media()
    clip = clip_path(sample.image or sample.video or sample.audio, data_folder)
    if sample.audio is None or modal not in ("audio", "video_audio"):
        return processor.load_media(clip, modal, **options)
    sound = processor.load_media(clip_path(sample.audio, data_folder), "audio", **options)
    picture = processor.load_media(clip, "video", **options) if modal == "video_audio" else Media()
    return Media(frames=picture.frames, audio=sound.audio)


def blank_media(processor: HumanOmniProcessor, modal: str, num_frames: int | None = None) -> Media:
    """Zeros in the shapes of `modal`'s tensors."""
    side = processor.config.vision_config.image_size
    mel = processor.feature_extractor
    frames = processor.num_frames if num_frames is None else num_frames
    return Media(
        frames=torch.zeros(frames, 3, side, side) if "<video>" in MODAL_TAGS[modal] else None,
        image=torch.zeros(3, side, side) if "<image>" in MODAL_TAGS[modal] else None,
        audio=torch.zeros(mel.feature_size, mel.nb_max_frames) if "<audio>" in MODAL_TAGS[modal] else None,
    )
