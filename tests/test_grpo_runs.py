"""GRPO through its entry point: one and two processes, ZeRO-2 and ZeRO-3, kill and resume, what a run leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import humanomni

WORKER = Path(__file__).with_name("grpo_worker.py")
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
LAUNCHES = {
    "two processes": (2, []),
    "zero2": (2, ["--deepspeed", str(REPOSITORY / "configs/deepspeed/zero2.json")]),
    "zero3": (2, ["--deepspeed", str(REPOSITORY / "configs/deepspeed/zero3.json")]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A list of eight prompts on four copies of the example clip, two of them without sound."""
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for number in range(8):
        clip = f"clip{number % 4}.mp4"
        (folder / clip).write_bytes(EXAMPLE.read_bytes())
        tags = "<video>\n<audio>\n" if number % 2 else "<video>\n"
        turns = [{"from": "human", "value": f"{tags}Felt, number {number}?"}, {"from": "gpt", "value": "happy"}]
        entries.append({"video": clip, "conversations": turns})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


def start(checkpoint, data, output, *options, processes=1, **environment) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        port = str(29600 + os.getpid() % 300)
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    command = [
        *launcher, str(WORKER), "--config", str(REPOSITORY / "configs/grpo.yaml"), "--model_path", str(checkpoint),
        "--data", str(data / "list.json"), "--data_folder", str(data), "--output_dir", str(output),
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--num_generations", "4",
        "--per_device_train_batch_size", str(8 // processes), "--gradient_accumulation_steps", "1",
        "--learning_rate", "1e-3", "--max_completion_length", "8", "--save_strategy", "no", "--disable_tqdm", "true",
        "--log_completions", "false", *options,
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=420, check=False)


def history(output: Path, step: int) -> list[dict]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def one_process(tiny_checkpoint, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    done = start(
        tiny_checkpoint, data, output, "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3", FIXED="1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return history(output, 3)


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_same_losses_however_it_is_launched(name, one_process, tiny_checkpoint, data, tmp_path):
    processes, options = LAUNCHES[name]
    options = [*options, "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3"]
    done = start(tiny_checkpoint, data, tmp_path, *options, processes=processes, FIXED="1")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = history(tmp_path, 3)
    for ours, other in zip(one_process, theirs, strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], abs=1e-4)
        assert other["kl"] == pytest.approx(ours["kl"], abs=1e-4)
        assert other["reward"] == pytest.approx(ours["reward"])
    assert one_process[-1]["kl"] > 1e-4  # the losses were compared while the model moved


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_real_steps_under_deepspeed(name, tiny_checkpoint, data, tmp_path):
    processes, options = LAUNCHES[name]
    done = start(tiny_checkpoint, data, tmp_path, *options, "--max_steps", "2", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    model, _ = humanomni.load_pretrained(tmp_path, device="cpu")
    assert model.config.architectures == ["HumanOmniQwen2ForCausalLM"]


def test_kill_and_resume_continue_the_trajectory(tiny_checkpoint, data, tmp_path):
    options = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--log_completions", "true"]
    options += ["--completions_every", "2", "--held_out", str(data / "list.json"), "--held_out_every", "2"]
    options += ["--held_out_new_tokens", "2"]
    whole = start(tiny_checkpoint, data, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = start(tiny_checkpoint, data, tmp_path / "cut", *options, KILL_AT="3")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "checkpoint-4").exists()
    resumed = start(tiny_checkpoint, data, tmp_path / "cut", *options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stderr
    for ours, theirs in zip(history(tmp_path / "whole", 4), history(tmp_path / "cut", 4), strict=True):
        for key in ("loss", "reward", "kl", "completions/mean_length", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-7), (ours["step"], key)

    logged = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in logged if "eval_war" in row] == [2, 4]
    left = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"training_curves.png", "config_resolved.yaml", "environment.json", "model.safetensors"} <= left
    assert [file.name for file in sorted((tmp_path / "whole" / "completions").iterdir())] == [
        "completions_00002.parquet",
        "completions_00004.parquet",
    ]
    assert "clip0.mp4" in whole.stdout or "clip1.mp4" in whole.stdout  # the table names the clips


def test_a_bad_clip_on_one_of_two_processes_hangs_nobody(tiny_checkpoint, data, tmp_path):
    entries = json.loads((data / "list.json").read_text())[:2]
    (tmp_path / "good.mp4").write_bytes(EXAMPLE.read_bytes())
    (tmp_path / "bad.mp4").write_bytes(EXAMPLE.read_bytes()[:3000])
    entries[0]["video"], entries[1]["video"] = "good.mp4", "bad.mp4"
    (tmp_path / "list.json").write_text(json.dumps(entries))
    output = tmp_path / "out"
    done = start(tiny_checkpoint, tmp_path, output, "--max_steps", "2", "--on_bad_sample", "skip", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    notes = [file.read_text() for file in output.glob("bad_samples.rank*.jsonl")]
    noted = [json.loads(line) for note in notes for line in note.splitlines()]
    assert {row["clip"] for row in noted} == {"bad.mp4"}
    done = start(tiny_checkpoint, tmp_path, tmp_path / "stopped", "--max_steps", "2", processes=2)
    assert done.returncode != 0
    assert "bad.mp4" in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rewards", "beauty"], "reward 'beauty' is unknown"),
        (["--max_prompt_length", "20"], "over max_prompt_length 20"),
        (["--data", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_a_mistake_is_one_line(options, told, tiny_checkpoint, data, tmp_path):
    done = start(tiny_checkpoint, data, tmp_path, *options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if told in line]
