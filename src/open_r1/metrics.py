"""The scores of emotion recognition: what the model answered, and how often that was right."""

import re
from collections import Counter

import numpy as np

from humanomni.errors import HumanOmniError
from open_r1.labels import SYNONYMS, canonical

OTHER = "other"  # the column of answers outside the classes

# As in the released reward, the dot of an answer stops at a line break, and the first match counts.
ANSWER = re.compile(r"<answer>(.*?)</answer>")
ANSWER_OVER_LINES = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WELL_FORMED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
BETWEEN_WORDS = re.compile(r"[,;/|&\n]|\band\b|\bor\b")


def parse_answer(text):
    """Returns the stripped text inside the first `<answer>..</answer>` of one line; else the whole text."""
    match = ANSWER.search(text)
    return (match.group(1) if match else text).strip()


def is_well_formed(text):
    """Whether the whole text is `<think>..</think>`, blanks at most, and `<answer>..</answer>`."""
    return WELL_FORMED.fullmatch(text) is not None


def map_answer(text, classes, synonyms=SYNONYMS):
    """Returns the one class of `classes` that a free-form response names, through `synonyms` too; None if unclear.

    Several words ("joyful, glad") are one answer only when each of them means the same class.
    """
    match = ANSWER_OVER_LINES.search(text)
    answer = match.group(1) if match else text
    whole = canonical(answer, classes, synonyms)
    if whole is not None:
        return whole
    named = {canonical(part, classes, synonyms) for part in BETWEEN_WORDS.split(answer) if part.strip()}
    return named.pop() if len(named) == 1 else None


def confusion_matrix(y_true, y_pred, classes):
    """Counts answers: rows are the true classes, columns the classes and then `OTHER`.

    Returns an int64 array of shape (K, K + 1). A prediction that is not one of `classes` (None too) is `OTHER`.
    Raises `HumanOmniError` if a true label is not one of `classes`, or the lists differ in length.
    """
    if len(y_true) != len(y_pred):
        raise HumanOmniError(f"{len(y_true)} labels and {len(y_pred)} predictions; give one prediction for each label")
    index = {label: position for position, label in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for true, predicted in zip(y_true, y_pred, strict=True):
        if true not in index:
            raise HumanOmniError(f"the label {true!r} is not one of the classes {', '.join(classes)}; choose its set")
        matrix[index[true], index.get(predicted, len(classes))] += 1
    return matrix


def weighted_average_recall(y_true, y_pred):
    """WAR in per cent: the recall of each class weighted by its frequency, which is accuracy.

    Raises `HumanOmniError` if the lists are empty or differ in length.
    """
    return _recalls_to_war_uar(*_hits_and_support(y_true, y_pred))[0]


def unweighted_average_recall(y_true, y_pred):
    """UAR in per cent: the mean recall over the classes that occur in `y_true`, whatever else was predicted.

    Raises `HumanOmniError` if the lists are empty or differ in length.
    """
    return _recalls_to_war_uar(*_hits_and_support(y_true, y_pred))[1]


def bootstrap_intervals(hits, support, resamples=1000, seed=0, confidence=95):
    """Percentile bootstrap over clips of WAR and UAR, in per cent: `([low, high], [low, high])`.

    `hits` and `support` (K,) count the right answers and the clips of each class. Drawing clips with replacement is
    one multinomial draw over the cells (class, right or wrong), which needs no loop over clips.
    """
    cells = np.concatenate([hits, np.asarray(support) - hits])
    draws = np.random.default_rng(seed).multinomial(cells.sum(), cells / cells.sum(), size=resamples)  # (R, 2K)
    right, wrong = np.split(draws, 2, axis=1)
    drawn = right + wrong  # (R, K)
    war = 100 * right.sum(1) / drawn.sum(1)
    recall = np.divide(right, drawn, out=np.zeros(drawn.shape), where=drawn > 0)
    uar = 100 * recall.sum(1) / (drawn > 0).sum(1)
    bounds = [(100 - confidence) / 2, (100 + confidence) / 2]
    return np.percentile(war, bounds).tolist(), np.percentile(uar, bounds).tolist()


def score(labels, responses, classes, synonyms=SYNONYMS, exclude_failed=False, resamples=1000, seed=0):
    """Scores raw responses against labels; returns a dict of plain numbers, lists and strings for `metrics.json`.

    `responses` holds the text of the model for each label, or None for a clip that failed: it counts as wrong, or is
    left out with `exclude_failed`. `strict` compares the parsed answer letter by letter, as released; `label_map` goes
    through `synonyms`, and lists the answers that only this map understood. Rates are per cent.
    Raises `HumanOmniError` for a label outside `classes`, lists of different length, or nothing to score.
    """
    if len(labels) != len(responses):
        raise HumanOmniError(f"{len(labels)} labels and {len(responses)} responses; give one response for each label")
    failed = sum(response is None for response in responses)
    if exclude_failed:
        pairs = [(label, response) for label, response in zip(labels, responses, strict=True) if response is not None]
        labels, responses = [label for label, _ in pairs], [response for _, response in pairs]
    if not labels:
        raise HumanOmniError("there are no predictions to score; give at least one clip that did not fail")

    answers = [None if response is None else parse_answer(response) for response in responses]
    understood = [None if response is None else map_answer(response, classes, synonyms) for response in responses]
    answered = [response for response in responses if response is not None]
    outside = Counter(answer for answer in answers if answer is not None and answer not in classes)
    mapped = Counter(
        (answer, label)
        for answer, label in zip(answers, understood, strict=True)
        if label is not None and answer != label
    )
    return {
        "n": len(labels),
        "failed": failed,
        "failed_clips": "left out" if exclude_failed else "counted as wrong",
        "classes": list(classes),
        "strict": _scores(labels, answers, classes, resamples, seed),
        "label_map": _scores(labels, understood, classes, resamples, seed)
        | {
            "mapped": [
                {"answer": answer, "label": label, "count": count} for (answer, label), count in _by_count(mapped)
            ]
        },
        "format_rate": 100 * sum(map(is_well_formed, answered)) / max(len(answered), 1),
        "outside_classes": {
            "count": outside.total(),
            "rate": 100 * outside.total() / max(len(answered), 1),
            "answers": [{"answer": answer, "count": count} for answer, count in _by_count(outside)],
        },
        "bootstrap": {"resamples": resamples, "seed": seed, "confidence": 95},
    }


def _scores(y_true, y_pred, classes, resamples, seed):
    matrix = confusion_matrix(y_true, y_pred, classes)
    hits, support, predicted = matrix.diagonal(), matrix.sum(1), matrix[:, :-1].sum(0)
    war, uar = _recalls_to_war_uar(hits, support)
    war_interval, uar_interval = bootstrap_intervals(hits, support, resamples, seed)
    per_class = {
        label: {
            "support": int(support[k]),
            "predicted": int(predicted[k]),
            "recall": _per_cent(hits[k], support[k]),
            "precision": _per_cent(hits[k], predicted[k]),
            "f1": _per_cent(2 * hits[k], support[k] + predicted[k]),
        }
        for k, label in enumerate(classes)
    }
    return {
        "war": war,
        "war_interval": war_interval,
        "uar": uar,
        "uar_interval": uar_interval,
        "per_class": per_class,
        "confusion_matrix": {"rows": list(classes), "columns": [*classes, OTHER], "counts": matrix.tolist()},
    }


def _hits_and_support(y_true, y_pred):
    if len(y_true) == 0:
        raise HumanOmniError("there are no labels to score; give at least one")
    matrix = confusion_matrix(y_true, y_pred, sorted(set(y_true)))
    return matrix.diagonal(), matrix.sum(1)


def _recalls_to_war_uar(hits, support):
    recall = hits[support > 0] / support[support > 0]
    return float(100 * hits.sum() / support.sum()), float(100 * recall.mean())


def _per_cent(part, whole):
    """None where there is nothing to divide by: without clips a class has no recall, without answers no precision."""
    return float(100 * part / whole) if whole else None


def _by_count(counter):
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))
