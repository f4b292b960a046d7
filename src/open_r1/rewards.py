"""Verifiable rewards: pure functions of completions, by name in a registry.

Every function has TRL's signature: `completions` is a list of conversations `[{"role": ..., "content": text}]`, the
data set's columns come as keyword arguments, and the result is one number a completion.
"""

import importlib
from collections import Counter
from collections.abc import Callable

from humanomni.errors import HumanOmniError
from open_r1.labels import EMOTION_WORDS
from open_r1.metrics import is_well_formed, map_answer, parse_answer


class RewardError(HumanOmniError):
    """A reward's name or setting is unknown."""


def texts_of(completions: list) -> list[str]:
    """The texts of conversational completions."""
    return [completion[0]["content"] for completion in completions]


def accuracy_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1 where the answer equals the label to the letter, else 0, as released.

    Both are the stripped text inside the first `<answer>..</answer>` (on one line), or the whole text without one. The
    release's symbolic maths check, which comes first there and never matters for emotion words, is left out: see
    docs/fidelity.md.
    """
    return [
        float(parse_answer(text) == parse_answer(label))
        for text, label in zip(texts_of(completions), solution, strict=True)
    ]


def format_reward(completions: list, **kwargs) -> list[float]:
    """1 where the whole completion is `<think>..</think>`, blanks at most, and `<answer>..</answer>`, as released."""
    return [float(is_well_formed(text)) for text in texts_of(completions)]


def label_map_accuracy(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1 where the answer means the label, synonyms included (the table in `open_r1.labels`), else 0."""
    return [
        float(map_answer(text, EMOTION_WORDS) == parse_answer(label))
        for text, label in zip(texts_of(completions), solution, strict=True)
    ]


def over_length_penalty(limit: int, buffer: int) -> Callable:
    """A soft penalty for long completions.

    With n the number of tokens: 0 for n <= limit - buffer, then falling linearly to -1 at n = limit, and -1 beyond
    (equation 13 of DAPO, arXiv 2503.14476).
    """

    def over_length(completions: list, completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [-min(1.0, max(0.0, (len(ids) - limit + buffer) / buffer)) for ids in completion_ids]

    return over_length


def repetition_penalty(size: int = 4, scale: float = 1.0) -> Callable:
    """A penalty for repeated runs of words.

    With N runs of `size` words in the completion and U distinct ones: -scale * (1 - U / N); 0 where there is no run
    (the n-gram penalty of "Demystifying Long Chain-of-Thought Reasoning", arXiv 2502.03373).
    """

    def repetition(completions: list, **kwargs) -> list[float]:
        penalties = []
        for text in texts_of(completions):
            words = text.lower().split()
            runs = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
            penalties.append(-scale * (1 - len(runs) / runs.total()) if runs else 0.0)
        return penalties

    return repetition


def reward_functions(names: list[str], max_completion_length: int) -> list[Callable]:
    """The functions of a list of names, each of `REWARDS` or a user's own `module:function`.

    Raises:
        RewardError: a name is unknown or does not import.
    """
    registry = {
        "accuracy": accuracy_reward,
        "format": format_reward,
        "label_map_accuracy": label_map_accuracy,
        "over_length": over_length_penalty(max_completion_length, max(1, max_completion_length // 4)),
        "repetition": repetition_penalty(),
    }
    functions = []
    for name in names:
        if name in registry:
            functions.append(registry[name])
        elif ":" in name:
            functions.append(_imported(name))
        else:
            raise RewardError(f"reward {name!r} is unknown; pass {', '.join(registry)} or module:function")
    return functions


def _imported(name: str) -> Callable:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward {name!r} does not import: {error}; pass module:function") from error
