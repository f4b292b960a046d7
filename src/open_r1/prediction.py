"""Asks a model about labelled samples, in batches that do not depend on who asks; in training and after it.

Shapes: B rows, L sequence.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from humanomni.errors import HumanOmniError, MediaError, PromptError
from humanomni.processing import HumanOmniProcessor, Media, stack_media
from humanomni.prompts import THINK_SENTENCE
from open_r1.cache_features import CachedFeatures, FeatureCache
from open_r1.data import DataError, Sample, SampleEncoder, blank_media, clip_path


@dataclass(frozen=True)
class Prediction:
    """What the model answered about sample number `index`, or why there is no answer."""

    index: int
    response: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Question:
    index: int
    sample: Sample
    text: str
    modal: str
    length: int  # tokens of the prompt, media included


class Predictor:
    """Puts each sample's own question to a model, greedily.

    Batches are made once, of samples with prompts of similar length, and a clip that fails keeps its place as a blank
    one. A text therefore never depends on which process asks, on what was done before a restart, or on which of its
    neighbours failed, even where a batch of another size would round differently.

    Args:
        samples: one question each; the label is `sample.answer`.
        data_folder: where relative clip paths start.
        feature_cache: opened for the same processor and data folder; no clip is read then.
        image_aspect_ratio: `square` or `pad`; by default squashed to a square as the released inference does, and as
            the cache was made where there is one.
        think: asks for the thinking process after every question that does not, in the words of inference.
        num_workers: threads that read clips ahead.

    Raises:
        DataError, PromptError, CacheError: one line on a sample that cannot be asked, or is not in the cache.
    """

    def __init__(
        self,
        processor: HumanOmniProcessor,
        samples: list[Sample],
        *,
        data_folder: str | os.PathLike = "",
        feature_cache: FeatureCache | None = None,
        image_aspect_ratio: str | None = None,
        think: bool = False,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        num_workers: int = 2,
    ):
        self.processor = processor
        self.data_folder = data_folder
        self.feature_cache = feature_cache
        self.image_aspect_ratio = frame_shape(processor, image_aspect_ratio, feature_cache is not None)
        self.max_new_tokens = max_new_tokens
        self.num_workers = num_workers
        encoder = SampleEncoder(processor)
        self.questions = [self._question(index, sample, encoder, think) for index, sample in enumerate(samples)]
        longest_first = sorted(self.questions, key=lambda question: -question.length)
        places = [question.index for question in longest_first]
        self.batches = [tuple(places[start : start + batch_size]) for start in range(0, len(places), batch_size)]

    def _question(self, index: int, sample: Sample, encoder: SampleEncoder, think: bool) -> _Question:
        if len(sample.turns) != 2:
            raise DataError(
                f"{sample.origin} has {len(sample.turns)} turns; evaluation takes a question and its label"
            )
        encoded = encoder(sample)
        text, modal = encoded.query, encoded.modal
        if think and THINK_SENTENCE not in text:
            text = f"{text}  {THINK_SENTENCE}"
        try:
            length = len(self._prompt(text, modal)[0])
        except PromptError as error:
            raise PromptError(f"{sample.origin}: {error}") from error
        context = self.processor.config.max_position_embeddings
        if length + self.max_new_tokens > context:
            raise PromptError(
                f"{sample.origin}: its prompt of {length} tokens and max_new_tokens {self.max_new_tokens} exceed the "
                f"model's context of {context}; lower --max_new_tokens"
            )
        if self.feature_cache is not None:
            with suppress(MediaError):  # noted as unreadable when the cache was made: a failed clip, a sound cache
                self.feature_cache.find(sample, modal)
        return _Question(index, sample, text, modal, length)

    def _prompt(self, text: str, modal: str) -> tuple[list[int], str]:
        """Token ids with placeholders expanded, and the text for BERT."""
        prompt, query = self.processor.build_prompt(text, modal)
        counts = self.processor.placeholder_counts()
        ids = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [token for token_id in ids for token in [token_id] * counts.get(token_id, 1)], query

    def answer(self, model, batches: Iterable[tuple[int, ...]]) -> Iterator[list[Prediction]]:
        """The predictions of each batch of `self.batches`, while threads read the clips of the next one."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            ahead = deque()
            for batch in batches:
                questions = [self.questions[index] for index in batch]
                ahead.append((questions, [pool.submit(self._read, question) for question in questions]))
                if len(ahead) > 1:
                    yield self._generate(model, *ahead.popleft())
            while ahead:
                yield self._generate(model, *ahead.popleft())

    def _read(self, question: _Question) -> tuple[Media | CachedFeatures, str | None]:
        """A clip, or a blank one and why it does not read."""
        sample, modal = question.sample, question.modal
        try:
            if self.feature_cache is not None:
                return self.feature_cache.get(sample, modal), None
            return self._load(sample, modal), None
        except HumanOmniError as error:
            if self.feature_cache is not None:
                return self.feature_cache.blank(modal), str(error)
            return blank_media(self.processor, modal), str(error)

    def _load(self, sample: Sample, modal: str) -> Media:
        if modal == "text":
            return Media()
        shown = {"start": sample.start, "end": sample.end, "image_aspect_ratio": self.image_aspect_ratio}
        clip = clip_path(sample.clip, self.data_folder)
        if sample.video is None or sample.audio is None or modal == "video":
            return self.processor.load_media(clip, modal, **shown)
        sound = self.processor.load_media(clip_path(sample.audio, self.data_folder), "audio", **shown)
        picture = self.processor.load_media(clip, "video", **shown) if modal == "video_audio" else Media()
        return Media(frames=picture.frames, audio=sound.audio)

    def _generate(self, model, questions: list[_Question], futures: list) -> list[Prediction]:
        clips, errors = zip(*(future.result() for future in futures), strict=True)
        prompts, queries = zip(*(self._prompt(question.text, question.modal) for question in questions), strict=True)
        stack = stack_media if self.feature_cache is None else self.feature_cache.stack
        batch = self.processor.pad(list(prompts)) | self.processor.tokenize_queries(list(queries)) | stack(list(clips))
        tokens = model.generate(
            **{name: tensor.to(model.device) for name, tensor in batch.items()},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        texts = self.processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
        return [
            Prediction(question.index, None if error else text.strip(), error)
            for question, text, error in zip(questions, texts, errors, strict=True)
        ]


def frame_shape(processor: HumanOmniProcessor, asked: str | None, cached: bool) -> str:
    """How frames are made square: as `asked`, else as the cache has them, else squashed as released inference does.

    Raises:
        PromptError: cached features show frames in another way than asked.
    """
    if not cached:
        return asked or processor.default_aspect_ratio("inference")
    made = processor.config.image_aspect_ratio or "square"
    if asked not in (None, made):
        raise PromptError(f"image_aspect_ratio is {asked!r}, but cached features show {made!r}; drop one of the two")
    return made


def check_labels(samples: list[Sample], classes: tuple[str, ...]) -> None:
    """Raises DataError where a sample's label is not one of the classes, before hours go into answers to it."""
    for sample in samples:
        if sample.answer not in classes:
            raise DataError(
                f"{sample.origin}: the label {sample.answer!r} is not one of {', '.join(classes)}; name its own set"
            )


def classes_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes of a set without a table: the labels that occur."""
    return tuple(sorted(set(labels)))
