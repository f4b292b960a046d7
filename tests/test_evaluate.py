"""Evaluation gives the same bytes however it is run and interrupted, survives bad clips, and leaves training alone."""

import dataclasses
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from media_factory import make_video
from sklearn.metrics import accuracy_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import SFTConfig

import humanomni
from humanomni.errors import HumanOmniError
from humanomni.generation import generate
from humanomni.prompts import EMOTION_QUESTION, THINK_SENTENCE
from open_r1.cache_features import cache_features
from open_r1.data import SupervisedCollator, read_samples
from open_r1.evaluate import EvaluateArguments, main, parse_entries, short_names
from open_r1.labels import CLASSES
from open_r1.metrics import parse_answer
from open_r1.prediction import Prediction, Predictor
from open_r1.prediction_files import PredictionFolder
from open_r1.trainer.evaluation_callback import EvaluationCallback, as_it_was, own_share
from open_r1.trainer.sft_trainer import HumanOmniSFTTrainer

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
WORDS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear", "sad", "happy")
BROKEN = 3  # this sample's clip does not read
QUESTIONS = ("<video>\n<audio>\n" + EMOTION_QUESTION, "<video>\nWhich emotion?", "<audio>\nHow does she feel?")
OPTIONS = ["--batch_size", "2", "--max_new_tokens", "8", "--device", "cpu"]
RESULTS = ("predictions.jsonl", "metrics.json", "report.html", "report.md", "confusion_matrix.png", "per_class.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with nine short clips, one of them cut off, and their list."""
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for place, word in enumerate(WORDS):
        clip = folder / f"{place}.mp4"
        if place % 2:
            make_video(clip, size=(64, 48 + 16 * place), audio=True)
        else:
            shutil.copy(EXAMPLE, clip)
        fields = {"video": clip.name, "start": 0.3 * place} if place % 2 == 0 else {"video": clip.name}
        human = {"from": "human", "value": QUESTIONS[place % 3]}
        samples.append({**fields, "conversations": [human, {"from": "gpt", "value": word}]})
    broken = folder / f"{BROKEN}.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    (folder / "list.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return humanomni.load_pretrained(tiny_checkpoint, device="cpu")


def command(checkpoint, data, out, *more):
    where = ["--data_folder", str(data), "--output_dir", str(out)]
    return ["--model_path", str(checkpoint), "--data", f"dfew:1={data / 'list.json'}", *where, *OPTIONS, *more]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, data, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("reference")
    assert main(command(tiny_checkpoint, data, out)) == 0
    return out / tiny_checkpoint.name / "dfew_fold_1"


def same_files(folder, reference):
    for name in RESULTS:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert not (folder / "unfinished").exists()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- one process


def test_every_clip_is_answered_once_and_a_bad_one_is_a_failed_prediction(reference, data):
    lines = lines_of(reference)
    assert [line["index"] for line in lines] == list(range(len(WORDS)))
    assert [line["label"] for line in lines] == list(WORDS)
    assert [line["video"] for line in lines] == [f"{place}.mp4" for place in range(len(WORDS))]
    assert [place for place, line in enumerate(lines) if "error" in line] == [BROKEN]
    assert lines[BROKEN]["response"] is None and f"{BROKEN}.mp4" in lines[BROKEN]["error"]
    assert all(line["response"] for line in lines if "error" not in line)
    assert {path.name for path in reference.iterdir()} == {*RESULTS, "settings.json"}

    metrics = json.loads((reference / "metrics.json").read_text())
    assert (metrics["n"], metrics["failed"], metrics["failed_clips"]) == (len(WORDS), 1, "counted as wrong")
    assert (metrics["dataset"], metrics["fold"], metrics["classes"]) == ("dfew", 1, list(CLASSES["dfew"]))
    assert metrics["settings"]["max_new_tokens"] == 8 and metrics["settings"]["image_aspect_ratio"] == "square"
    assert f"{BROKEN}.mp4: " in (reference / "report.html").read_text("utf-8")


@pytest.mark.parametrize(("think", "places"), [(False, (0, 1, 2, 8)), (True, (4,))])
def test_answers_are_those_of_one_clip_at_a_time_at_inference(loaded, data, think, places):
    """The prompts are right, and neither neighbours nor left padding change a text."""
    model, processor = loaded
    samples = read_samples(data / "list.json")
    predictor = Predictor(processor, samples, data_folder=data, think=think, batch_size=4, max_new_tokens=8)
    assert sorted(index for batch in predictor.batches for index in batch) == list(range(len(samples)))
    answers = {one.index: one for some in predictor.answer(model, predictor.batches) for one in some}
    modals = ("video_audio", "video", "audio")
    assert answers[BROKEN].response is None
    for place in places:
        sample = samples[place]
        question = QUESTIONS[place % 3].replace("<video>\n", "").replace("<audio>\n", "")
        asked = f"{question}  {THINK_SENTENCE}" if think else question
        span = {"start": sample.start, "end": sample.end}
        alone = generate(
            model, processor, asked, str(data / sample.video), modals[place % 3], **span, max_new_tokens=8
        )
        assert answers[place].response == alone


def test_a_mended_clip_is_asked_again_and_its_neighbours_stay_the_same(tiny_checkpoint, reference, data, tmp_path):
    folder = tmp_path / "out" / tiny_checkpoint.name / "dfew_fold_1"
    shutil.copytree(reference, folder)
    mended = tmp_path / "data"
    shutil.copytree(data, mended)
    shutil.copy(EXAMPLE, mended / f"{BROKEN}.mp4")
    assert main(command(tiny_checkpoint, mended, tmp_path / "out")) == 0
    before, after = lines_of(reference), lines_of(folder)
    assert after[BROKEN]["response"] and "error" not in after[BROKEN]
    assert after[:BROKEN] + after[BROKEN + 1 :] == before[:BROKEN] + before[BROKEN + 1 :]
    assert main(command(tiny_checkpoint, mended, tmp_path / "anew")) == 0
    assert lines_of(tmp_path / "anew" / tiny_checkpoint.name / "dfew_fold_1") == after


def test_a_finished_evaluation_is_only_scored_again(tiny_checkpoint, data, tmp_path, capsys):
    samples = [sample for place, sample in enumerate(json.loads((data / "list.json").read_text())) if place != BROKEN]
    checkpoint, folder = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_checkpoint, checkpoint)
    shutil.copytree(data, folder)
    (folder / "list.json").write_text(json.dumps(samples))
    assert main(command(checkpoint, folder, tmp_path / "out")) == 0
    result = tmp_path / "out" / "model" / "dfew_fold_1"
    before = {name: (result / name).read_bytes() for name in RESULTS}
    for clip in folder.glob("[1-9].mp4"):
        clip.unlink()
    weights = checkpoint / "model.safetensors"
    state = weights.stat()
    weights.write_bytes(bytes(state.st_size))  # would not load
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert main(command(checkpoint, folder, tmp_path / "out")) == 0
    assert {name: (result / name).read_bytes() for name in RESULTS} == before

    os.utime(weights)
    capsys.readouterr()
    assert main(command(checkpoint, folder, tmp_path / "out")) == 2
    assert "predictions made with checkpoint" in capsys.readouterr().err


def test_other_settings_do_not_mix_in_one_folder(tiny_checkpoint, reference, data, capsys):
    out = reference.parent.parent
    assert main(command(tiny_checkpoint, data, out, "--max_new_tokens", "9")) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: .*made with max_new_tokens 8, not 9; .*--output_dir\n$", error)


def test_cached_features_stand_in_for_clips_and_towers(tiny_checkpoint, loaded, data, tmp_path, capsys):
    cache, samples = tmp_path / "cache", read_samples(data / "list.json")
    cache_features(samples, loaded[1], cache, data_folder=data, device="cpu", on_bad_sample="skip")
    assert main(command(tiny_checkpoint, data, tmp_path / "raw", "--image_aspect_ratio", "pad")) == 0
    gone = tmp_path / "gone"
    gone.mkdir()
    shutil.copy(data / "list.json", gone)
    shutil.copy2(data / f"{BROKEN}.mp4", gone)  # with its time: the cache knows it by that
    with_cache = command(tiny_checkpoint, gone, tmp_path / "cached", "--feature_cache", str(cache))
    assert main(with_cache) == 0
    folders = [tmp_path / kind / tiny_checkpoint.name / "dfew_fold_1" for kind in ("raw", "cached")]
    raw, cached = map(lines_of, folders)
    assert [line.get("response") for line in cached] == [line.get("response") for line in raw]
    assert "bad_clips.jsonl" in cached[BROKEN]["error"]
    settings = json.loads((folders[1] / "metrics.json").read_text())["settings"]
    assert settings["cached_features"] is True and settings["image_aspect_ratio"] == "pad"

    capsys.readouterr()
    assert main([*with_cache, "--image_aspect_ratio", "square"]) == 2
    assert "'square', but cached features show 'pad'" in capsys.readouterr().err
    (tmp_path / "more.json").write_text(json.dumps([sample_entry("other.mp4")]))
    assert main([*with_cache, "--data", f"dfew={tmp_path / 'more.json'}"]) == 2
    assert "other.mp4 are not in the feature cache" in capsys.readouterr().err


def test_several_checkpoints_and_sets(tiny_checkpoint, data, tmp_path, capsys):
    """Two checkpoints of the same name, two folds and a set of one's own, in one report with means."""
    twin = tmp_path / "other" / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, twin)
    own = tmp_path / "own.json"
    own.write_text(json.dumps([sample_entry("0.mp4", "bored"), sample_entry("2.mp4", "happy")]))
    few = tmp_path / "few.json"
    few.write_text(json.dumps([sample_entry("0.mp4", "sad"), sample_entry("2.mp4", "happy")]))
    where = ["--data_folder", str(data), "--output_dir", str(tmp_path / "out"), *OPTIONS]
    sets = [f"dfew:1={few}", f"dfew:2={few}", str(own)]
    assert main(["--model_path", str(tiny_checkpoint), str(twin), "--data", *sets, *where]) == 0
    names = [f"{folder.parent.name}_{folder.name}" for folder in (tiny_checkpoint, twin)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["fold_means"]
    assert [(mean["model"], mean["dataset"], mean["folds"], mean["n"]) for mean in summary] == [
        (name, "dfew", [1, 2], 4) for name in names
    ]
    for name in names:
        metrics = json.loads((tmp_path / "out" / name / "own" / "metrics.json").read_text())
        assert metrics["classes"] == ["bored", "happy"]
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "report.md").read_text()
    assert table.count("dfew, mean of 2 folds") == 2 and "R1-Omni (published)" in table
    assert (tmp_path / "out" / "report.html").read_text("utf-8").count("<img") == 12


def sample_entry(clip, label="happy"):
    human = {"from": "human", "value": "<video>\n<audio>\nWhich emotion?"}
    return {"video": clip, "conversations": [human, {"from": "gpt", "value": label}]}


# ------------------------------------------------------------------------------------------ several processes, kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(processes, tiny_checkpoint, reference, data, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = ["-m", "open_r1.evaluate", *command(tiny_checkpoint, data, tmp_path)]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| dfew fold 1 |") == 1, "one process alone reports"
    same_files(tmp_path / tiny_checkpoint.name / "dfew_fold_1", reference)


def killed_in_the_middle(arguments, folder):
    """Runs two processes and kills both when a prediction is on disk; False where they were done before that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "open_r1.evaluate", *arguments],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 200
    try:
        while not written(folder) and not (folder / "predictions.jsonl").exists():
            if any(process.poll() for process in running) or time.monotonic() > deadline:
                raise AssertionError([process.stderr.read() for process in running if process.poll()])
            time.sleep(0.002)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return 0 < written(folder) < len(WORDS)


def written(folder):
    """How many predictions are on disk while the run is under way."""
    return sum(part.read_text("utf-8").count("\n") for part in folder.glob("unfinished/*.jsonl"))


@pytest.mark.slow
def test_a_kill_in_the_middle_and_a_restart_with_fewer_processes(tiny_checkpoint, reference, data, tmp_path):
    for attempt in range(3):  # a machine that has other things to do may notice the first line late
        out = tmp_path / str(attempt)
        folder = out / tiny_checkpoint.name / "dfew_fold_1"
        if killed_in_the_middle(command(tiny_checkpoint, data, out), folder):
            break
    else:
        raise AssertionError("each kill came too late to test anything")
    with open(next(folder.glob("unfinished/*.jsonl")), "a") as file:
        file.write('{"index": 8, "video": "8.mp4", "resp')  # as a kill within a write leaves it
    assert main(command(tiny_checkpoint, data, out)) == 0
    same_files(folder, reference)


def test_half_a_line_is_dropped_and_an_answer_stands_before_an_error(tmp_path):
    folder = PredictionFolder(tmp_path / "run", {"a": 1})
    assert folder.open() == {}
    with folder.appending(0) as add:
        add({"index": 1, "error": "is empty"})
        add({"index": 0, "response": "x\u2028y"})
    with open(tmp_path / "run/unfinished/rank0.jsonl", "a") as file:
        file.write('{"index": 2, "resp')
    again = PredictionFolder(tmp_path / "run", {"a": 1})
    assert sorted(again.open()) == [0, 1]
    with again.appending(0) as add:
        add({"index": 2, "response": "z"})
    with again.appending(5) as add:
        add({"index": 1, "response": "w"})
    with pytest.raises(RuntimeError, match="3 predictions for 4 samples"):
        again.finish(4)
    assert [line.get("response") for line in again.finish(3)] == ["x\u2028y", "w", "z"]
    assert (tmp_path / "run/predictions.jsonl").read_text("utf-8").count("\n") == 3
    with pytest.raises(HumanOmniError, match="made with a 1, not 2"):
        PredictionFolder(tmp_path / "run", {"a": 2}).open()


# ------------------------------------------------------------------------------------------------ files of predictions


def released(path, rows, lines=False):
    entries = [
        {"gt": gt, "response": response, "source": source, "video_path": f"/clips/{place}.mp4"}
        for place, (gt, response, source) in enumerate(rows)
    ]
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    return path


ROWS = [
    ("happy", "<think>a</think>\n<answer>happy</answer>", "DFEW"),
    ("sad", "sorrowful", "DFEW"),
    ("sad", "happy", "DFEW"),
    ("anxious", "<answer>anxious</answer>", "MAFW"),
    ("helpless", None, "MAFW"),
]


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_of_the_release_is_scored_by_its_sources(tmp_path, lines, capsys):
    file = released(tmp_path / ("p.jsonl" if lines else "p.json"), ROWS, lines)
    assert main(["--predictions", str(file), "--output_dir", str(tmp_path / "out"), "--model_name", "theirs"]) == 0
    dfew, mafw = (
        json.loads((tmp_path / "out" / "theirs" / name / "metrics.json").read_text()) for name in ("dfew", "mafw")
    )
    assert dfew["strict"]["war"] == pytest.approx(100 / 3) and dfew["strict"]["uar"] == pytest.approx(50)
    assert dfew["label_map"]["war"] == pytest.approx(200 / 3)
    assert dfew["label_map"]["mapped"] == [{"answer": "sorrowful", "label": "sad", "count": 1}]
    assert dfew["classes"] == list(CLASSES["dfew"]) and dfew["settings"]["predictions"] == str(file)
    assert (mafw["n"], mafw["failed"], mafw["strict"]["war"]) == (2, 1, 50)
    assert "| mafw | theirs | 2 |" in capsys.readouterr().out


def test_named_files_folds_and_left_out_failures(tmp_path, capsys):
    one = released(tmp_path / "1.json", ROWS[:3])
    two = released(tmp_path / "2.json", [ROWS[0], ("sad", None, "x")])
    files = [f"dfew:1={one}", f"dfew:2={two}"]
    assert main(["--predictions", *files, "--output_dir", str(tmp_path / "out"), "--exclude-failed"]) == 0
    two = json.loads((tmp_path / "out/predictions/dfew_fold_2/metrics.json").read_text())
    assert (two["n"], two["failed"], two["failed_clips"], two["strict"]["war"]) == (1, 1, "left out", 100)
    mean = json.loads((tmp_path / "out/summary.json").read_text())["fold_means"][0]
    assert mean["strict"]["war"] == pytest.approx((100 / 3 + 100) / 2) and mean["folds"] == [1, 2]
    assert "| dfew, mean of 2 folds | predictions | 4 | 66.67 |" in capsys.readouterr().out

    assert main(["--predictions", str(one), "--dataset", "mafw", "--output_dir", str(tmp_path / "named")]) == 0
    assert [path.name for path in (tmp_path / "named" / "predictions").iterdir()] == ["mafw"]


def test_own_predictions_are_scored_again_to_the_same_figures(reference, tmp_path):
    assert main(["--predictions", f"dfew:1={reference / 'predictions.jsonl'}", "--output_dir", str(tmp_path)]) == 0
    was = json.loads((reference / "metrics.json").read_text())
    now = json.loads((tmp_path / "predictions/dfew_fold_1/metrics.json").read_text())
    for name in ("n", "failed", "strict", "label_map", "format_rate", "outside_classes"):
        assert now[name] == was[name]


def test_a_label_map_of_ones_own(tmp_path):
    file = released(tmp_path / "p.json", ROWS[:3])
    (tmp_path / "map.yaml").write_text("happy: [sorrowful]\n")
    options = ["--label_map", str(tmp_path / "map.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["--predictions", f"dfew={file}", *options]) == 0
    metrics = json.loads((tmp_path / "out/predictions/dfew/metrics.json").read_text())
    assert metrics["label_map"]["mapped"] == [{"answer": "sorrowful", "label": "happy", "count": 1}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no predictions"),
        ("[1]", "entry 0 is a int"),
        ("[", "is not JSON"),
        ('{"gt": "sad"', "line 1 is not JSON"),
        ('{"response": "sad"}', "label .or gt. is None"),
        ('{"gt": "sad"}', "response is None"),
        ('{"gt": "sad", "response": ["sad"]}', "response is .'sad'."),
        ('{"gt": "calm", "response": "sad", "source": "dfew"}', "'calm' is not one of the classes"),
    ],
)
def test_files_that_cannot_be_scored_get_one_line(content, told, tmp_path, capsys):
    file = tmp_path / "p.json"
    file.write_text(content)
    assert main(["--predictions", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error) and error.startswith("error: ") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ command line


def test_mistakes_get_one_line_and_status_2(tiny_checkpoint, data, tmp_path, capsys):
    (tmp_path / "calm.json").write_text(json.dumps([sample_entry("0.mp4", "calm")]))
    (tmp_path / "lost.json").write_text(json.dumps([sample_entry("lost.mp4")]))
    turns = [*sample_entry("0.mp4")["conversations"], *({"from": who, "value": "sad"} for who in ("human", "gpt"))]
    (tmp_path / "turns.json").write_text(json.dumps([{"video": "0.mp4", "conversations": turns}]))
    (tmp_path / "bad.yaml").write_text("thinks: true\n")
    model, list_ = ["--model_path", str(tiny_checkpoint)], str(data / "list.json")
    for arguments, told in (
        ([], "nothing to evaluate; pass --model_path and --data, or --predictions"),
        (["--no_such_option"], "--no_such_option"),
        (["--batch_size", "many"], "invalid int value: 'many'"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (["--config", str(tmp_path / "bad.yaml"), *model], "thinks"),
        ([*model, "--predictions", "p.json"], "drop --model_path"),
        ([*model, "--data", list_, "--batch_size", "0"], "batch_size is 0"),
        ([*model, "--data", f"dfew={list_}", f"dfew={list_}"], "both the set dfew; name them apart, e.g. dfew:1="),
        ([*model, "--data", "dfew=none.json"], "none.json does not exist"),
        ([*model, "--data", f"dfew={tmp_path / 'calm.json'}"], "sample 0: the label 'calm' is not one of"),
        ([*model, "--data", f"dfew={tmp_path / 'lost.json'}"], "none of its 1 clips is there, e.g. lost.mp4"),
        ([*model, *model[1:], "--data", f"dfew={list_}", "--data_folder", str(data)], "stands twice in model_path"),
        (["--model_path", "nowhere", "--data", f"dfew={list_}", "--data_folder", str(data)], "nowhere is neither"),
        ([*model, "--data", str(tmp_path / "turns.json"), "--data_folder", str(data)], "has 4 turns"),
        ([*model, "--data", list_, "--data_folder", str(data), "--max_new_tokens", "40000"], "lower --max_new_tokens"),
        (["--predictions", "p.json", "--label_map", str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
        (["--predictions", str(tmp_path / "none.json")], "none.json does not exist"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2, told
        error = capsys.readouterr().err
        assert told in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    told = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(f"--{field.name}" in told for field in dataclasses.fields(EvaluateArguments))
    assert "--config" in told and "NAME:FOLD=LIST" in " ".join(told.split())


def test_configuration_file_and_script(tmp_path, capsys):
    file = released(tmp_path / "p.json", ROWS[:3])
    (tmp_path / "c.yaml").write_text(f"predictions: dfew={file}\noutput_dir: {tmp_path / 'out'}\nseed: 3\n")
    assert main(["--config", str(tmp_path / "c.yaml"), "--seed", "4"]) == 0
    assert json.loads((tmp_path / "out/predictions/dfew/metrics.json").read_text())["bootstrap"]["seed"] == 4

    values = {"PYTHON": "echo", "MODEL_PATH": "a b", "DATA": "dfew:1=x mafw=y", "OUTPUT": "o", "NPROC": "1"}
    script = ["bash", str(REPOSITORY / "scripts" / "evaluate.sh"), "--think", "false"]
    told = subprocess.run(script, env=os.environ | values, capture_output=True, text=True, check=True).stdout
    assert told == (
        "-m open_r1.evaluate --config configs/evaluate.yaml --model_path a b --data dfew:1=x mafw=y "
        "--data_folder data --output_dir o --think false\n"
    )
    told = subprocess.run(script, env=os.environ | values | {"NPROC": "4"}, capture_output=True, text=True).stdout
    assert told.startswith("-m torch.distributed.run --nnodes 1 --nproc_per_node 4")


def test_entries_and_names():
    told = [(entry.path, entry.name, entry.fold) for entry in parse_entries(["DFEW:2=a/b.json", "x/y=z.json"], None)]
    assert told == [("a/b.json", "dfew", 2), ("x/y=z.json", "y=z", None)]
    assert parse_entries(["a.json"], "mafw")[0].classes([]) == CLASSES["mafw"]
    assert short_names(["/a/x", "/b/y"]) == ["x", "y"]
    assert short_names(["/m/a/ck", "/m/b/ck", "/m/c/d"]) == ["a_ck", "b_ck", "c_d"]


# ------------------------------------------------------------------------------------------------------ in training


def train(checkpoint, data, out, every=None, steps=3, learning_rate=1e-3):
    """A short fine-tuning; returns the trainer."""
    model, processor = humanomni.load_pretrained(checkpoint, device="cpu")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(("model.layers", "model.mm_projector")))
    samples = [sample for place, sample in enumerate(read_samples(data / "list.json")) if place != BROKEN]
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to=["tensorboard"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        seed=1,
    )
    trainer = HumanOmniSFTTrainer(
        model=model,
        args=arguments,
        data_collator=SupervisedCollator(processor, data_folder=data),
        train_dataset=Dataset.from_list([{"sample": dataclasses.asdict(sample)} for sample in samples]),
        processing_class=processor,
    )
    if every:
        held_out = read_samples(data / "list.json")
        predictor = Predictor(processor, held_out, data_folder=data, batch_size=4, max_new_tokens=6)
        trainer.add_callback(EvaluationCallback(trainer, predictor, every, "dfew"))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")
    try:
        return train(tiny_checkpoint, data, out, every=2), out
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]


def test_training_is_the_same_with_and_without_evaluation(evaluated, tiny_checkpoint, data, tmp_path):
    trainer, _ = evaluated
    plain = train(tiny_checkpoint, data, tmp_path)
    figures = ("loss", "grad_norm", "mean_token_accuracy", "learning_rate")

    def logged(history):
        return [{name: line[name] for name in figures} for line in history if "loss" in line]

    assert len(logged(plain.state.log_history)) == 3
    assert logged(trainer.state.log_history) == logged(plain.state.log_history)
    for (name, weight), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert trainer.model.training and not trainer.model.model.bert_model.training
    assert trainer.model.is_gradient_checkpointing


def test_figures_in_the_log_are_those_of_the_model_at_that_step(evaluated, data):
    trainer, out = evaluated
    lines = [line for line in trainer.state.log_history if "eval_war" in line]
    assert [line["step"] for line in lines] == [2, 3]
    predictor = next(
        one for one in trainer.callback_handler.callbacks if isinstance(one, EvaluationCallback)
    ).predictor
    with as_it_was(trainer.model):
        answers = [one for some in predictor.answer(trainer.model.eval(), predictor.batches) for one in some]
    texts = {one.index: parse_answer(one.response or "") for one in answers}
    texts = [texts[place] for place in range(len(WORDS))]
    present = sorted(set(WORDS))
    uar = 100 * recall_score(WORDS, texts, labels=present, average="macro", zero_division=0)
    assert lines[-1]["eval_war"] == pytest.approx(100 * accuracy_score(WORDS, texts))
    assert lines[-1]["eval_uar"] == pytest.approx(uar) and lines[-1]["eval_failed"] == 1

    events = EventAccumulator(str(out / "logs")).Reload()
    assert {"eval/war", "eval/uar", "train/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/war")] == [2, 3]


def test_right_answers_score(evaluated):
    trainer, _ = evaluated
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, EvaluationCallback))
    scores = callback.scores([Prediction(place, "<answer>happy</answer>") for place in reversed(range(len(WORDS)))])
    assert scores["eval_war"] == pytest.approx(100 * 2 / 9) and scores["eval_uar"] == pytest.approx(100 / 7)


@pytest.mark.slow
def test_processes_share_the_held_out_clips(tiny_checkpoint, loaded, data, tmp_path):
    """Two processes train without learning, so that both must log what the untouched checkpoint answers."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from open_r1.training import leave\n"
        "from test_evaluate import EvaluationCallback, train\n"
        "checkpoint, data, out = map(Path, sys.argv[1:])\n"
        "trainer = train(checkpoint, data, out, every=1, steps=1, learning_rate=0.0)\n"
        "callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EvaluationCallback))\n"
        "answers = [(one.index, one.response) for one in callback.answers()]\n"
        "logs = [line for line in trainer.state.log_history if 'eval_war' in line]\n"
        "(out / os.environ['RANK']).write_text(json.dumps([answers, logs]))\n"
        "leave()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*launcher, str(script), str(tiny_checkpoint), str(data), str(tmp_path)], **options)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second and len(first[1]) == 1

    model, processor = loaded
    predictor = Predictor(
        processor, read_samples(data / "list.json"), data_folder=data, batch_size=4, max_new_tokens=6
    )
    expected = {one.index: one.response for some in predictor.answer(model, predictor.batches) for one in some}
    assert len(predictor.batches) == 3, "an odd number, so that one batch is answered twice"
    assert len(first[0]) > len(WORDS) and dict(map(tuple, first[0])) == expected


def test_every_process_generates_equally_often():
    batches = list("abcde")
    for size in range(1, 8):
        shares = [own_share(batches, rank, size) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert {batch for share in shares for batch in share} == set(batches)


def test_random_numbers_and_modes_are_restored():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    model[1].eval()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(KeyError), as_it_was(model):
        model.eval()
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
