"""The scores equal the released ones and scikit-learn's, and every odd answer is counted where it belongs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

from humanomni.errors import HumanOmniError
from open_r1.labels import CLASSES, EMOTION_WORDS, SYNONYMS, canonical, read_synonyms
from open_r1.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    is_well_formed,
    map_answer,
    parse_answer,
    score,
    unweighted_average_recall,
    weighted_average_recall,
)

GOLDEN = Path(os.environ.get("R1_OMNI_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
GOLDEN = GOLDEN / "setA" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden data is not at {GOLDEN}")

DFEW = CLASSES["dfew"]
ANSWERS = [*DFEW, "Happy", "", "contempt", "<think>x</think>", "other"]
PAIRS = st.lists(st.tuples(st.sampled_from(DFEW), st.sampled_from(ANSWERS)), min_size=1, max_size=80)


@needs_golden
def test_war_and_uar_equal_the_released_scores():
    lists = json.loads((GOLDEN / "metrics.json").read_text())["lists"]
    assert len(lists) == 3
    for row in lists:
        assert weighted_average_recall(row["y_true"], row["y_pred"]) == pytest.approx(row["war"], abs=1e-9)
        assert unweighted_average_recall(row["y_true"], row["y_pred"]) == pytest.approx(row["uar"], abs=1e-9)
        scores = score(row["y_true"], row["y_pred"], row["classes"])["strict"]
        recalls = [scores["per_class"][label]["recall"] / 100 for label in row["classes"]]
        assert recalls == pytest.approx(row["per_class_recall"], abs=1e-12)


@given(PAIRS)
@settings(deadline=None)
def test_war_and_uar_equal_scikit_learn(pairs):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    present = sorted(set(y_true))
    macro = recall_score(y_true, y_pred, labels=present, average="macro", zero_division=0)
    assert weighted_average_recall(y_true, y_pred) == pytest.approx(100 * accuracy_score(y_true, y_pred))
    assert unweighted_average_recall(y_true, y_pred) == pytest.approx(100 * macro)


@given(PAIRS)
@settings(deadline=None, max_examples=40)
def test_per_class_scores_equal_scikit_learn(pairs):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    expected = precision_recall_fscore_support(y_true, y_pred, labels=list(DFEW), zero_division=np.nan)
    per_class = score(y_true, y_pred, DFEW, resamples=10)["strict"]["per_class"]
    for row, precision, recall, f1, support in zip(per_class.values(), *expected, strict=True):
        assert row["support"] == support
        for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert row[name] is None if np.isnan(value) else row[name] == pytest.approx(100 * value)


def test_a_class_absent_from_the_ground_truth_does_not_lower_uar():
    assert unweighted_average_recall(["sad", "sad", "happy"], ["sad", "fear", "happy"]) == 75.0
    assert weighted_average_recall(["sad", "sad", "happy"], ["sad", "fear", "happy"]) == pytest.approx(200 / 3)


@pytest.mark.parametrize("metric", [weighted_average_recall, unweighted_average_recall])
@pytest.mark.parametrize(("y_true", "y_pred"), [([], []), (["sad"], []), (["sad"], ["sad", "sad"])])
def test_lists_that_cannot_be_scored_are_refused(metric, y_true, y_pred):
    with pytest.raises(HumanOmniError, match="give"):
        metric(y_true, y_pred)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>\n<answer> happy </answer>", "happy"),
        ("  happy\n", "happy"),
        ("<answer>sad</answer><answer>happy</answer>", "sad"),
        ("<answer>\nsad\n</answer>", "<answer>\nsad\n</answer>"),
        ("<answer>\n</answer><answer>sad</answer>", "sad"),
        ("<answer></answer>", ""),
        ("<answer>happy", "<answer>happy"),
        ("<ANSWER>happy</ANSWER>", "<ANSWER>happy</ANSWER>"),
        ("", ""),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer


@needs_golden
def test_parsing_and_format_equal_the_released_rewards():
    rows = json.loads((GOLDEN / "rewards.json").read_text())["rows"]
    assert len(rows) > 40
    for row in rows:
        assert is_well_formed(row["completion"]) == bool(row["format"]), row["completion"]
        if row["solution"] in ("happy", "<answer> happy </answer>"):  # the others are read by the symbolic check
            assert (parse_answer(row["completion"]) == "happy") == bool(row["accuracy"]), row["completion"]


@pytest.mark.parametrize(
    ("text", "dataset", "label"),
    [
        ("<think>a</think><answer>Joyful.</answer>", "dfew", "happy"),
        ("<answer>\nhappy\n</answer>", "dfew", "happy"),
        ("worried", "mafw", "anxious"),
        ("worried", "dfew", None),
        ("calm", "ravdess", "calm"),
        ("calm", "dfew", "neutral"),
        ("peaceful", "ravdess", "calm"),
        ("joyful, glad and cheerful", "dfew", "happy"),
        ("happy, surprised", "dfew", None),
        ("sadness and a lot more", "dfew", None),
        ("She is happy about the news, and he is sad.", "dfew", None),
        ("", "dfew", None),
    ],
)
def test_map_answer(text, dataset, label):
    assert map_answer(text, CLASSES[dataset]) == label


def test_every_synonym_means_one_class_of_each_set():
    assert set(SYNONYMS) == {*EMOTION_WORDS, "calm"}
    for classes in CLASSES.values():
        for label in set(SYNONYMS) & set(classes):
            for word in SYNONYMS[label]:
                meanings = {other for other in classes if word == other or word in SYNONYMS[other]}
                assert word == word.casefold() and meanings in ({label}, {"calm", "neutral"})
                assert canonical(f' "{word.upper()}." ', classes) == ("calm" if "calm" in meanings else label)


def test_a_label_map_file_replaces_the_table(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("happy: [Radiant]\n")
    assert map_answer("radiant", DFEW, read_synonyms(path)) == "happy"
    assert map_answer("joyful", DFEW, read_synonyms(path)) is None
    for text in ("[happy]", "happy: joyful", "happy: [1]", "{"):
        path.write_text(text)
        with pytest.raises(HumanOmniError) as error:
            read_synonyms(path)
        assert "map.yaml" in str(error.value) and "\n" not in str(error.value)


def test_confusion_matrix_has_a_column_for_other_answers():
    matrix = confusion_matrix(["sad", "sad", "sad", "fear"], ["sad", "Sad", None, "sad"], ("sad", "fear"))
    assert matrix.tolist() == [[1, 0, 2], [1, 0, 0]]
    with pytest.raises(HumanOmniError, match="'calm' is not one of the classes"):
        confusion_matrix(["calm"], ["calm"], DFEW)


def test_score_tells_strict_mapped_outside_and_failed_apart():
    labels = ["happy", "happy", "sad", "sad", "fear", "fear"]
    responses = [
        "<think>a</think>\n<answer>happy</answer>",
        "<answer>Joyful</answer>",
        "sad",
        "<think>a</think><answer>bittersweet</answer>",
        "<answer>Joyful</answer>",
        None,
    ]
    scores = score(labels, responses, DFEW)
    assert (scores["n"], scores["failed"], scores["failed_clips"]) == (6, 1, "counted as wrong")
    assert scores["strict"]["war"] == pytest.approx(100 * 2 / 6)
    assert scores["strict"]["uar"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0) / 3)
    assert scores["label_map"]["war"] == pytest.approx(100 * 3 / 6)
    assert scores["label_map"]["mapped"] == [{"answer": "Joyful", "label": "happy", "count": 2}]
    assert scores["outside_classes"] == {
        "count": 3,
        "rate": pytest.approx(60),
        "answers": [{"answer": "Joyful", "count": 2}, {"answer": "bittersweet", "count": 1}],
    }
    assert scores["format_rate"] == pytest.approx(40)
    assert scores["strict"]["per_class"]["neutral"]["recall"] is None
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores

    left_out = score(labels, responses, DFEW, exclude_failed=True)
    assert (left_out["n"], left_out["failed"], left_out["failed_clips"]) == (5, 1, "left out")
    assert left_out["strict"]["war"] == pytest.approx(40)
    with pytest.raises(HumanOmniError, match="no predictions"):
        score(["sad"], [None], DFEW, exclude_failed=True)


def test_all_failed_clips_score_zero():
    scores = score(["sad", "happy"], [None, None], DFEW)
    assert scores["strict"]["war"] == scores["strict"]["uar"] == scores["format_rate"] == 0.0


def test_bootstrap_intervals_follow_the_seed_and_resampling_of_clips():
    hits, support = np.array([30, 5]), np.array([40, 20])
    war, uar = bootstrap_intervals(hits, support, resamples=4000, seed=1)
    assert (war, uar) == bootstrap_intervals(hits, support, resamples=4000, seed=1)
    assert war != bootstrap_intervals(hits, support, resamples=4000, seed=2)[0]

    clips = [(0, 1)] * 30 + [(0, 0)] * 10 + [(1, 1)] * 5 + [(1, 0)] * 15
    rng = np.random.default_rng(0)
    drawn = np.array(clips)[rng.integers(0, len(clips), (4000, len(clips)))]  # (R, clips, (class, right))
    direct_war = 100 * drawn[:, :, 1].mean(1)
    recalls = [(drawn[:, :, 1] * (drawn[:, :, 0] == k)).sum(1) / (drawn[:, :, 0] == k).sum(1) for k in (0, 1)]
    assert war == pytest.approx(np.percentile(direct_war, [2.5, 97.5]), abs=1.7)
    assert uar == pytest.approx(np.percentile(50 * (recalls[0] + recalls[1]), [2.5, 97.5]), abs=1.7)
