"""The rewards: the released table, the formulas of the further ones, and their names."""

import json

import pytest

from open_r1.rewards import (
    RewardError,
    accuracy_reward,
    format_reward,
    label_map_accuracy,
    over_length_penalty,
    repetition_penalty,
    reward_functions,
)

# Rows of the record that the release's symbolic maths check decides; docs/fidelity.md lists them.
DECIDED_BY_MATHS = {28, 30, 31, 32, 34}


def said(*texts: str) -> list:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_every_row_of_the_released_table(golden):
    rows = json.loads((golden / "golden" / "rewards.json").read_text())["rows"]
    texts, labels = said(*(row["completion"] for row in rows)), [row["solution"] for row in rows]
    assert format_reward(texts) == [row["format"] for row in rows]
    ours = accuracy_reward(texts, labels)
    differing = {index for index, row in enumerate(rows) if row["accuracy"] != ours[index]}
    assert differing == DECIDED_BY_MATHS
    assert all(any(mark in rows[index]["solution"] for mark in "0123456789$") for index in differing)


def test_accuracy_and_format_without_the_record():
    texts = said("<think>a</think>\n<answer> sad </answer>", "sad", "<answer>Sad</answer>", "<answer>sad\n</answer>")
    assert accuracy_reward(texts, ["<answer>sad</answer>"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert format_reward(texts) == [1.0, 0.0, 0.0, 0.0]


def test_the_label_map_knows_synonyms():
    texts = said("<answer>joyful</answer>", "<answer>worried</answer>", "<answer>table</answer>")
    assert label_map_accuracy(texts, ["happy", "anxious", "happy"]) == [1.0, 1.0, 0.0]


def test_the_penalty_for_length_is_soft():
    penalty = over_length_penalty(limit=100, buffer=20)
    ids = [[0] * length for length in (10, 80, 90, 100, 150)]
    assert penalty(said(*"abcde"), completion_ids=ids) == pytest.approx([0, 0, -0.5, -1, -1])


def test_the_penalty_for_repetition_counts_repeated_runs():
    texts = said("a b c d e", "a b a b a b", "one two")
    assert repetition_penalty(size=2)(texts) == pytest.approx([0, -(1 - 2 / 5), 0])


def test_rewards_by_name():
    functions = reward_functions(["accuracy", "format", "statistics:mean"], max_completion_length=64)
    assert [function.__name__ for function in functions] == ["accuracy_reward", "format_reward", "mean"]
    for wrong in ("beauty", "nowhere:there", "statistics:nothing"):
        with pytest.raises(RewardError, match=wrong):
            reward_functions([wrong], max_completion_length=64)
