"""HumanOmniProcessor: a question and a clip, or lists of them, to the tensors that the model takes.

Shapes: B rows, L sequence, N videos, I images, S sounds, T frames, M mel bins, Q words of the BERT query.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    BertTokenizer,
    ProcessorMixin,
    SiglipImageProcessorPil,
    WhisperFeatureExtractor,
)

from humanomni import media
from humanomni.configuration import HumanOmniConfig
from humanomni.errors import CheckpointError, PromptError
from humanomni.modeling import find_checkpoint, read_config, set_placeholder_ids
from humanomni.prompts import MEDIA_TAGS, MODAL_TAGS, QWEN2_VL_TOKENS, build_prompt, check_question
from humanomni.towers import attach_tower_configs, first_line

logger = logging.getLogger(__name__)

DEFAULT_NUM_FRAMES = 8
ASPECT_RATIOS = ("square", "pad")


@dataclass(frozen=True)
class Media:
    """One clip, ready for the towers; None where the modal does not show it."""

    frames: torch.Tensor | None = None  # (T, 3, height, width)
    image: torch.Tensor | None = None  # (3, height, width)
    audio: torch.Tensor | None = None  # (M, 3000) log-mel


class HumanOmniProcessor(ProcessorMixin):
    """Reads media, asks the question in one of three styles and expands each placeholder to its number of tokens."""

    def __init__(
        self,
        tokenizer,
        image_processor: SiglipImageProcessorPil,
        feature_extractor: WhisperFeatureExtractor,
        bert_tokenizer: BertTokenizer,
        config: HumanOmniConfig,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.feature_extractor = feature_extractor
        self.bert_tokenizer = bert_tokenizer
        self.config = config
        self.chat_template = tokenizer.chat_template
        self.token_ids = placeholder_ids(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        vision_tower: str | None = None,
        audio_tower: str | None = None,
        bert_model: str | None = None,
        **kwargs,
    ) -> "HumanOmniProcessor":
        """Reads the tokenizer from the checkpoint and the other parts from the tower folders (as the model does).

        Raises:
            CheckpointError: a file is missing or does not read.
        """
        folder = find_checkpoint(pretrained_model_name_or_path)
        config = read_config(folder)
        attach_tower_configs(
            config, folder, {"mm_vision_tower": vision_tower, "mm_audio_tower": audio_tower, "mm_bert": bert_model}
        )
        processor = cls(
            load_tokenizer(folder),
            _load_part(SiglipImageProcessorPil, "mm_vision_tower", config),
            _load_part(WhisperFeatureExtractor, "mm_audio_tower", config),
            _load_part(BertTokenizer, "mm_bert", config),
            config,
        )
        set_placeholder_ids(config, processor.token_ids)
        return processor

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Writes the tokenizer; the other parts belong to the tower folders that the checkpoint's config names."""
        self.tokenizer.save_pretrained(save_directory, save_jinja_files=False)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "pixel_values_videos",
            "pixel_values",
            "input_features",
            "bert_input_ids",
            "bert_attention_mask",
        ]

    def __call__(
        self,
        instruct: str | list[str],
        video=None,
        modal: str | list[str] = "video_audio",
        *,
        prompt_style: str = "inference",
        start: float | list | None = None,
        end: float | list | None = None,
        image_aspect_ratio: str | None = None,
        num_frames: int | None = None,
    ) -> BatchFeature:
        """The batch for `model(**batch)` and `model.generate(**batch)`, padded on the left.

        Args:
            instruct: the question, without media tags; one for all clips, or a list with one a clip.
            video: what `load_media` takes, or a `Media` it returned; a list of those for a batch (a folder, an array
                or a list of frames counts as one clip: put it in a list).
            modal: `video_audio`, `video`, `audio`, `image` or `text`; one for all, or a list.
            prompt_style: `inference`, `release_sft` or `release_grpo`.
            start, end: the part of the clip to see and hear, in seconds; one for all, or a list.
            image_aspect_ratio: `pad` (to a square, with the mean colour) or `square` (squashed to one). By default
                squashed for the inference style and as `config.json` says for the other two, as released.
            num_frames: frames a clip; by default as `config.json` says.

        Returns:
            `input_ids` and `attention_mask` (B, L), `bert_input_ids` and `bert_attention_mask` (B, Q), and of
            `pixel_values_videos` (N, T, 3, height, width), `pixel_values` (I, 3, height, width) and
            `input_features` (S, M, 3000) those that some row shows.

        Raises:
            PromptError, MediaError: one line that names what cannot be asked or read.
        """
        questions, clips, modals, starts, ends = _align(instruct, video, modal, start, end)
        for question, kind in zip(questions, modals, strict=True):
            check_question(question, kind)
        loaded = [
            clip
            if isinstance(clip, Media)
            else self.load_media(
                clip,
                kind,
                start=begin,
                end=finish,
                image_aspect_ratio=image_aspect_ratio or self.default_aspect_ratio(prompt_style),
                num_frames=num_frames,
            )
            for clip, kind, begin, finish in zip(clips, modals, starts, ends, strict=True)
        ]
        rows, queries = [], []
        for question, kind, clip in zip(questions, modals, loaded, strict=True):
            prompt, query = self.build_prompt(question, kind, prompt_style)
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            counts = self.placeholder_counts(0 if clip.frames is None else len(clip.frames))
            rows.append([token for token_id in ids for token in [token_id] * counts.get(token_id, 1)])
            queries.append(query)
        return BatchFeature({**self.pad(rows), **self.tokenize_queries(queries), **stack_media(loaded)})

    @property
    def num_frames(self) -> int:
        """Frames a clip is sampled to."""
        return self.config.num_frames or DEFAULT_NUM_FRAMES

    def default_aspect_ratio(self, prompt_style: str) -> str:
        """The released inference squashes frames; the released training does as `config.json` says."""
        return "square" if prompt_style == "inference" else self.config.image_aspect_ratio or "square"

    def load_media(
        self,
        video,
        modal: str = "video_audio",
        *,
        start: float | None = None,
        end: float | None = None,
        image_aspect_ratio: str = "square",
        num_frames: int | None = None,
    ) -> Media:
        """Reads one clip; safe to call from several threads.

        Args:
            video: a video, audio or image file, a folder of frames, a GIF, an array (T, height, width, 3), a list of
                PIL images or arrays, or a 1-D waveform at 16 kHz for modal `audio`.
        """
        if modal not in MODAL_TAGS:
            raise PromptError(f"modal {modal!r} is unknown; pass one of {', '.join(MODAL_TAGS)}")
        if modal == "text":
            if video is not None:
                raise PromptError(f"modal 'text' takes no clip, but got {video!r}; drop it or choose another modal")
            return Media()
        if video is None:
            raise PromptError(f"modal {modal!r} needs a clip; pass one, e.g. with --video_path")
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise PromptError(f"image_aspect_ratio is {image_aspect_ratio!r}; pass one of {', '.join(ASPECT_RATIOS)}")
        if modal == "image":
            return Media(image=self._pixels([media.read_image(video)], image_aspect_ratio)[0])
        frames = audio = None
        if modal in ("video", "video_audio"):
            count = self.num_frames if num_frames is None else num_frames
            images = media.read_frames(video, count, start=start, end=end)
            frames = self._pixels(images, image_aspect_ratio)
        if modal in ("audio", "video_audio"):
            audio = self._log_mel(video, start, end)
        return Media(frames=frames, audio=audio)

    def _pixels(self, images: list, image_aspect_ratio: str) -> torch.Tensor:
        """PIL images -> (len(images), 3, height, width), normalised."""
        if image_aspect_ratio == "pad":
            mean = tuple(int(channel * 255) for channel in self.image_processor.image_mean)
            images = [pad_to_square(image, mean) for image in images]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _log_mel(self, source, start: float | None, end: float | None) -> torch.Tensor:
        """The source's sound -> (M, 3000) log-mel of one window."""
        rate, seconds = self.feature_extractor.sampling_rate, self.feature_extractor.chunk_length
        waveform = media.read_waveform(source, sampling_rate=rate, max_seconds=seconds, start=start, end=end)
        return self.feature_extractor(waveform, sampling_rate=rate, return_tensors="pt")["input_features"][0]

    def build_prompt(self, instruct: str, modal: str, prompt_style: str = "inference") -> tuple[str, str]:
        """The text of the prompt, one tag for each medium, and the text for BERT."""
        return build_prompt(instruct, modal, prompt_style, self.config.mm_use_x_start_end, self._apply_user_template)

    def _apply_user_template(self, text: str) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )

    def placeholder_counts(self, num_frames: int | None = None) -> dict[int, int]:
        """How many tokens each placeholder id stands for, for a clip of `num_frames` (by default, `config.json`'s)."""
        frames = self.num_frames if num_frames is None else num_frames
        return {
            self.token_ids["<video>"]: frames * self.config.tokens_per_frame,
            self.token_ids["<image>"]: self.config.tokens_per_frame,
            self.token_ids["<audio>"]: self.config.tokens_per_audio,
        }

    def tokenize_queries(self, queries: list[str]) -> dict[str, torch.Tensor]:
        """BERT's input for a list of questions: `bert_input_ids` and `bert_attention_mask` (B, Q)."""
        encoded = self.bert_tokenizer(queries, padding=True, truncation=True, return_tensors="pt")
        return {"bert_input_ids": encoded["input_ids"], "bert_attention_mask": encoded["attention_mask"]}

    def pad(self, rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
        """Rows of token ids to `input_ids` and `attention_mask` (B, L)."""
        encoded = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def decode(self, token_ids, **kwargs):
        """Token ids to text, special tokens left out."""
        return self.tokenizer.decode(token_ids, **{"skip_special_tokens": True, **kwargs})

    def batch_decode(self, rows, **kwargs) -> list[str]:
        """Rows of token ids to texts, special tokens left out."""
        return self.tokenizer.batch_decode(rows, **{"skip_special_tokens": True, **kwargs})


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of `colour` as wide as its longer side."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def stack_media(clips: list[Media]) -> dict[str, torch.Tensor]:
    """The media of a batch, row by row, under the model's names; those that no clip has are left out."""
    columns = {
        "pixel_values_videos": [clip.frames for clip in clips if clip.frames is not None],
        "pixel_values": [clip.image for clip in clips if clip.image is not None],
        "input_features": [clip.audio for clip in clips if clip.audio is not None],
    }
    return {name: torch.stack(tensors) for name, tensors in columns.items() if tensors}


def _align(instruct, video, modal, start, end) -> tuple[list, list, list, list, list]:
    """Five lists of one length, single values repeated."""
    one_clip = not isinstance(video, (list, tuple)) or is_frame_list(video)
    columns = {"instruct": instruct, "modal": modal, "start": start, "end": end}
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, (list, tuple))}
    if not one_clip:
        lengths["video"] = len(video)
    size = max(lengths.values(), default=1)
    if size == 0 or any(length != size for length in lengths.values()):
        told = ", ".join(f"{length} for {name}" for name, length in lengths.items())
        raise PromptError(f"lists of a batch must be equally long and not empty, but there are {told}")
    clips = list(video) if not one_clip else [video] * size
    rows = {
        name: list(column) if isinstance(column, (list, tuple)) else [column] * size
        for name, column in columns.items()
    }
    return rows["instruct"], clips, rows["modal"], rows["start"], rows["end"]


def is_frame_list(video: list) -> bool:
    """True for the frames of one clip: PIL images, or arrays of one frame."""
    return bool(video) and all(
        not isinstance(item, (str, Path, Media)) and item is not None and np.ndim(item) == 3 for item in video
    )


def load_tokenizer(folder: Path):
    """The checkpoint's tokenizer with Qwen2-VL's special tokens and the three media placeholders added.

    Raises:
        CheckpointError: the files are missing or hold no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} does not load: {first_line(error)}; download the checkpoint again"
        ) from error
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"the tokenizer in {folder} has no chat_template; add the one of the released checkpoint"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*QWEN2_VL_TOKENS, *MEDIA_TAGS]}, replace_extra_special_tokens=False
    )
    return tokenizer


def placeholder_ids(tokenizer) -> dict[str, int]:
    """The ids of `<image>`, `<video>` and `<audio>`."""
    return dict(zip(MEDIA_TAGS, tokenizer.convert_tokens_to_ids(list(MEDIA_TAGS)), strict=True))


def _load_part(part_class, field: str, config: HumanOmniConfig):
    folder = getattr(config, field)
    try:
        return part_class.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"{field}: {folder} holds no readable {part_class.__name__} files: {first_line(error)}; download it again"
        ) from error


AutoProcessor.register(HumanOmniConfig, HumanOmniProcessor)
