"""The miniature's script end to end at smoke size: real clips, every training, evaluation and the report."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from open_r1.mini import results

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["towers", "features", "base", "cold_start", "sft_1", "grpo"]
STAGES += ["evaluate_labels", "evaluate_reasoning", "evaluate_video", "evaluate_audio"]


def reproduce(output, *options):
    command = ["bash", "scripts/reproduce_mini.sh", "--smoke", "--output", str(output), *options]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.timeout(1200)
def test_the_whole_experiment_at_smoke_size(tmp_path):
    output = tmp_path / "out"
    first = reproduce(output)
    assert first.returncode == 0, first.stderr[-3000:]
    chain = output / "seed_0"
    assert sorted(file.name for file in (output / "finished" / "seed_0").iterdir()) == sorted(STAGES)
    for model in ("HumanOmni", "EMER-SFT", "MAFW-DFEW-SFT-1", "R1-Omni"):
        assert (chain / model / "model.safetensors").exists()
        assert (chain / model / "training_curves.png").exists()
        for name in results.SETS:
            metrics = json.loads((chain / "evaluation" / model / name / "metrics.json").read_text())
            assert metrics["n"] == 16 and metrics["failed"] == 0
    state = json.loads((chain / "R1-Omni" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "reward" in entry]
    assert len(logged) == 2 and all(entry["tower_clips"] == 0 for entry in logged)

    table = (output / "results.md").read_text()
    assert table in first.stdout
    for row in ("RLVR (R1-Omni)", "label-only SFT, 1 epoch", "ceiling, from the true cues", "65.8 / 56.3"):
        assert row in table
    page = (output / "report" / "report.html").read_text()
    assert page.count("data:image/png") > 12 and "Training of RLVR" in page and "://" not in page

    # what is finished is skipped; what is not is made again, and nothing else
    (output / "finished" / "seed_0" / "evaluate_audio").unlink()
    stamp = (chain / "R1-Omni" / "model.safetensors").stat().st_mtime_ns
    second = reproduce(output)
    assert second.returncode == 0 and table in second.stdout and len(second.stdout) < len(first.stdout)
    assert second.stderr.count(" is done") == len(STAGES)  # the world too, and all but one of the chain's
    assert (chain / "R1-Omni" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("options", "told"), [(["--seed", "1"], "unknown option --seed"), (["--seeds"], "--seeds needs a value")]
)
def test_a_mistyped_option_is_told(options, told, tmp_path):
    run = reproduce(tmp_path / "out", *options)
    assert run.returncode == 2 and told in run.stderr and not (tmp_path / "out").exists()


def test_results_of_nothing_are_one_line(tmp_path, capsys):
    assert results.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
