"""The record of a run: settings and environment come back from the files, and the curves show what was logged."""

import importlib.metadata
import json
import logging
import math
import subprocess
import sys
from enum import Enum
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from transformers import TrainingArguments

from open_r1 import run_record
from open_r1.run_record import environment, git_state, plot_training_curves, write_run_record

PANELS = {
    "Loss": ["loss", "eval_loss"],
    "Learning rate": ["learning_rate"],
    "Gradient norm": ["grad_norm"],
    "Reward": ["reward"],
}


def history(points: int) -> list[dict]:
    noise = np.random.default_rng(0).standard_normal(points)
    entries = [
        {
            "step": step,
            "loss": 3 * math.exp(-3 * step / points) + 0.2 * noise[step - 1],
            "learning_rate": 2e-5 * (1 + math.cos(math.pi * step / points)) / 2,
            "grad_norm": float(abs(noise[step - 1])),
        }
        for step in range(1, points + 1)
    ]
    return [
        *entries,
        {"step": points // 2, "eval_loss": 1.0},
        {"step": points, "eval_loss": 0.7, "train_runtime": 9.0},
    ]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_settings_come_back_from_the_record(tmp_path):
    class Kind(Enum):
        COSINE = "cosine"

    settings = {
        "data": tmp_path / "list.json",
        "learning_rate": 2e-5,
        "parts": ("a", "b"),
        "text": "è: [x]",
        "no": None,
    }
    write_run_record(tmp_path / "run", {**settings, "kind": Kind.COSINE})
    read = yaml.safe_load((tmp_path / "run" / "config_resolved.yaml").read_text("utf-8"))
    assert read["learning_rate"] == 2e-5 and read["parts"] == ["a", "b"]
    assert read["text"] == "è: [x]" and read["no"] is None
    assert read["data"] == str(tmp_path / "list.json")


def test_training_arguments_are_a_config(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="cosine")
    write_run_record(tmp_path, arguments.to_dict())
    read = yaml.safe_load((tmp_path / "config_resolved.yaml").read_text("utf-8"))
    assert read["lr_scheduler_type"] == "cosine" and read["use_cpu"] is True


def test_the_environment_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-m", "x", "--data", "a b", "--hub_token", "hf_1", "--key_token=2"]
    )
    write_run_record(tmp_path, {})
    read = json.loads((tmp_path / "environment.json").read_text())
    assert read["world_size"] == 4
    assert read["torch"] == torch.__version__
    assert read["packages"]["torch"] == importlib.metadata.version("torch")
    assert read["python"] == ".".join(map(str, sys.version_info[:3]))
    assert read["command"] == "python -m x --data 'a b' --hub_token '***' '--key_token=***'"
    assert read["started"].endswith("+00:00")
    assert len(read["gpus"]) == torch.cuda.device_count()


def test_git_state_tells_revision_and_changes(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("1\n")
    assert git_state(code) is None, "nothing is tracked yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = git_state(code)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (code / "a.py").write_text("2\n")
    assert git_state(code) == {**clean, "dirty": True}
    (tmp_path / "venv").mkdir()
    assert git_state(tmp_path / "venv") is None
    assert git_state(tmp_path / "nowhere") is None


def test_without_git_the_state_is_null(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_run_record(tmp_path / "run", {})
    plot_training_curves(history(5), tmp_path / "curves.png", PANELS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("points", [1, 5, 300, 100_000])
def test_curves_are_drawn_for_any_length(points, tmp_path):
    path = tmp_path / "new" / "training_curves.png"
    plot_training_curves(history(points), path, PANELS)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (748, 1210)  # three panels: the reward was never logged
    quarters = [pixels[:374, :605], pixels[:374, 605:], pixels[374:, :605], pixels[374:, 605:]]
    coloured = [np.ptp(part[..., :3], axis=-1).max() > 0.2 for part in quarters]
    assert coloured == [True, True, True, False]


def test_the_curves_hold_what_was_logged():
    logged = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "other": 1}]
    logged += [{"step": 4, "loss": float("inf")}, {"step": 5, "loss": "none"}, {"loss": 9.0}, {"step": 6, "loss": 1}]
    curve = run_record._curve(logged, "loss")
    assert curve.to_dict() == {1: 2.0, 6: 1.0}


def test_nothing_is_drawn_of_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for logged, panels in (([], PANELS), ([{"step": 1, "train_runtime": 3.0}], PANELS), (history(5), {})):
        plot_training_curves(logged, tmp_path / "curves.png", panels)
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("is not drawn") == 3
