"""From requests to answers: `generate` for one call, `generate_many` for a stream of clips that are read ahead."""

import itertools
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from humanomni.errors import HumanOmniError, PromptError
from humanomni.modeling import HumanOmniQwen2ForCausalLM
from humanomni.processing import HumanOmniProcessor, Media, is_frame_list
from humanomni.prompts import DEFAULT_INSTRUCT, check_question

DEFAULT_MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """One clip and what to ask about it; `start` and `end` are seconds."""

    path: str | None = None
    modal: str = "video_audio"
    instruct: str = DEFAULT_INSTRUCT
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Result:
    """What came of a request: a text and its parts, or an error of one line.

    `seconds` is the wall time of reading the clip plus its share of the time its batch took to generate.
    """

    request: Request
    text: str | None = None
    think: str | None = None
    answer: str | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Loaded:
    request: Request
    seconds: float
    clip: Media | None = None
    error: str | None = None


def generate(
    model: HumanOmniQwen2ForCausalLM,
    processor: HumanOmniProcessor,
    instruct: str | list[str] = DEFAULT_INSTRUCT,
    video=None,
    modal: str | list[str] = "video_audio",
    *,
    prompt_style: str = "inference",
    start: float | list | None = None,
    end: float | list | None = None,
    image_aspect_ratio: str | None = None,
    num_frames: int | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    **generate_kwargs,
) -> str | list[str]:
    """Asks the model about one clip, or about a batch.

    Args:
        instruct, video, modal, prompt_style, start, end, image_aspect_ratio, num_frames: as for the processor's call.
        temperature, top_p: used when sampling; where None, the checkpoint's `generation_config.json` decides.
        seed: makes sampling repeatable, for the same batch on the same machine.
        streamer: takes the tokens of a single clip as they come, e.g. `StdoutStreamer`.
        generate_kwargs: anything else for `model.generate`.

    Returns:
        The text without prompt and special tokens, stripped; a list of them where any argument is a list of several
        clips' values, or where `num_return_sequences` asks for more.

    Raises:
        PromptError, MediaError: one line that names what cannot be asked or read, or how long the prompt is.
    """
    batch = processor(
        instruct,
        video,
        modal,
        prompt_style=prompt_style,
        start=start,
        end=end,
        image_aspect_ratio=image_aspect_ratio,
        num_frames=num_frames,
    )
    for length in batch["attention_mask"].sum(dim=1).tolist():
        _check_length(length, max_new_tokens, model.config.max_position_embeddings)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    tokens = model.generate(
        **batch.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=streamer,
        **{name: value for name, value in sampling.items() if value is not None},
        **generate_kwargs,
    )
    texts = [text.strip() for text in processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :])]
    several = any(isinstance(argument, (list, tuple)) for argument in (instruct, modal, start, end)) or (
        isinstance(video, (list, tuple)) and not is_frame_list(video)
    )
    return texts if several or len(texts) > 1 else texts[0]


def generate_many(
    model: HumanOmniQwen2ForCausalLM,
    processor: HumanOmniProcessor,
    requests: Iterable[Request],
    *,
    batch_size: int = 8,
    num_workers: int = 2,
    prompt_style: str = "inference",
    image_aspect_ratio: str | None = None,
    num_frames: int | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    seed: int | None = None,
    **decoding,
) -> Iterator[Result]:
    """Answers requests in batches, in their order, while worker threads read the clips of the next two batches.

    A request that cannot be read or asked yields a result with `error`; its place in the batch goes to the next one.
    Decoded greedily, a text does not depend on its neighbours. Other arguments are those of `generate`; `seed` is
    set once, before the first batch.
    """
    if seed is not None:
        torch.manual_seed(seed)
    aspect = image_aspect_ratio or processor.default_aspect_ratio(prompt_style)

    def load(request: Request) -> _Loaded:
        started = time.perf_counter()
        try:
            check_question(request.instruct, request.modal)
            clip = processor.load_media(
                request.path,
                request.modal,
                start=request.start,
                end=request.end,
                image_aspect_ratio=aspect,
                num_frames=num_frames,
            )
        except HumanOmniError as error:
            return _Loaded(request, time.perf_counter() - started, error=str(error))
        return _Loaded(request, time.perf_counter() - started, clip)

    def check(loaded: _Loaded) -> _Loaded:
        if loaded.clip is None:
            return loaded
        request = loaded.request
        row = processor(request.instruct, [loaded.clip], request.modal, prompt_style=prompt_style)
        try:
            _check_length(row["input_ids"].shape[1], max_new_tokens, model.config.max_position_embeddings)
        except PromptError as error:
            return _Loaded(request, loaded.seconds, error=str(error))
        return loaded

    def answer(waiting: list[_Loaded]) -> Iterator[Result]:
        readable = [loaded for loaded in waiting if loaded.clip is not None]
        started = time.perf_counter()
        texts = readable and generate(
            model,
            processor,
            [loaded.request.instruct for loaded in readable],
            [loaded.clip for loaded in readable],
            [loaded.request.modal for loaded in readable],
            prompt_style=prompt_style,
            max_new_tokens=max_new_tokens,
            **decoding,
        )
        share = (time.perf_counter() - started) / max(len(readable), 1)
        remaining = iter(texts)
        for loaded in waiting:
            if loaded.clip is None:
                yield Result(loaded.request, error=loaded.error)
            else:
                text = next(remaining)
                think, label = split_answer(text)
                yield Result(loaded.request, text, think, label, loaded.seconds + share)

    waiting = []  # in input order, failed ones between those of the next batch
    for loaded in map(check, _run_ahead(load, requests, num_workers, 2 * batch_size)):
        waiting.append(loaded)
        if sum(loaded.clip is not None for loaded in waiting) in (0, batch_size):
            yield from answer(waiting)
            waiting = []
    yield from answer(waiting)


def split_answer(text: str) -> tuple[str | None, str | None]:
    """The insides of the first `<think>..</think>` and `<answer>..</answer>`, stripped; None where there is none."""
    found = (re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("think", "answer"))
    think, answer = (match and match[1].strip() for match in found)
    return think, answer


class StdoutStreamer(TextStreamer):
    """Prints a text on stdout word by word as it is generated: in the end exactly what `generate` returns."""

    def __init__(self, processor: HumanOmniProcessor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.begun = False
        self.held = ""  # white space that is printed only if a word follows

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self.held + text if self.begun else text.lstrip()
        words = text.rstrip()
        self.begun = self.begun or bool(words)
        self.held = text[len(words) :]
        print(words, end="\n" if stream_end else "", flush=True)


def _check_length(length: int, max_new_tokens: int, context: int) -> None:
    """Raises PromptError where a prompt of `length` tokens and its answer exceed the model's context."""
    room = context - length
    if room < 1:
        raise PromptError(
            f"the prompt takes {length} tokens, but the model's context (max_position_embeddings) holds {context}; "
            f"shorten the instruction or lower --num_frames"
        )
    if max_new_tokens > room:
        raise PromptError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed the model's context "
            f"(max_position_embeddings) of {context}; lower --max_new_tokens to {room} or less"
        )


def _run_ahead(function: Callable, items: Iterable, num_workers: int, ahead: int) -> Iterator:
    """`map(function, items)` in threads, at most `ahead` results before the consumer."""
    items = iter(items)
    pool = ThreadPoolExecutor(num_workers)
    try:
        futures = deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
