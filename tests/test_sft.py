"""Supervised fine-tuning through its entry point: launches, resume, faults, what trains, what is written and shown."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY
from media_factory import make_sound, make_video
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel
from trl import SFTConfig

import humanomni
from humanomni.errors import CheckpointError, HumanOmniError
from open_r1 import cache_features, sft
from open_r1.data import DataError, Sample, SupervisedCollator, total_seconds
from open_r1.training import (
    ModelArguments,
    checkpoint_to_resume,
    load_for_training,
    parse_arguments,
    run,
    what_is_missing,
)

WORKER = Path(__file__).with_name("sft_worker.py")
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
ZERO = {name: ["--deepspeed", str(REPOSITORY / f"configs/deepspeed/{name}.json")] for name in ("zero2", "zero3")}
BASE = {
    "config": REPOSITORY / "configs/cold_start.yaml",
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_num_workers": "0",
    "learning_rate": "3e-3",
    "max_steps": "5",
}
SHOWN = {  # kind of sample -> its tags and clip
    "both": ("<video>\n<audio>\n", {"video": "clip.mp4"}),
    "video": ("<video>\n", {"video": "clip.mp4"}),
    "sound": ("<audio>\n", {"audio": "sound.wav"}),
    "image": ("<image>\n", {"image": "face.png"}),
    "text": ("", {}),
}


def entry(kind: str, answer: str, question: str = "Which emotion is it?", **media: str) -> dict:
    """An entry of a sample file."""
    tags, clip = SHOWN[kind]
    turns = [{"from": "human", "value": tags + question}, {"from": "gpt", "value": answer}]
    return {**(media or clip), "conversations": turns}


def write_list(path: Path, entries: list[dict]) -> Path:
    path.write_text(json.dumps(entries), "utf-8")
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with a short video that has sound, a sound, an image, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    make_video(folder / "clip.mp4", size=(64, 64), audio=True)
    make_sound(folder / "sound.wav", seconds=1.5)
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(folder / "face.png")
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:2000])
    shutil.copy(EXAMPLE, folder)
    return folder


@pytest.fixture(scope="module")
def mixed(clips) -> Path:
    """Five batches of four: with two processes and two samples each, one often lacks the media of the other."""
    batches = [
        ["both", "sound", "text", "text"],
        ["text", "text", "video", "image"],
        ["image", "text", "both", "video"],
        ["sound", "text", "both", "both"],
        ["text", "image", "sound", "text"],
    ]
    kinds = [kind for batch in batches for kind in batch]
    answers = ["sad", "<think>She smiles.</think>\n<answer>happy</answer>", "angry and tense", "a"]
    entries = [entry(kind, answers[index % 4] + "!" * (index % 3)) for index, kind in enumerate(kinds)]
    return write_list(clips / "mixed.json", entries)


def options(checkpoint: Path, data: Path, output: Path, **changes) -> list[str]:
    """The command line of a small run; a list stands for several values."""
    settings = {**BASE, "model_path": checkpoint, "data": data, "data_folder": data.parent, "output_dir": output}
    words = []
    for name, value in {**settings, **changes}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train(*args, **changes) -> Path:
    """Runs the entry point's main in this process; the output folder."""
    argv = options(*args, **changes)
    run(lambda: sft.main(argv))
    return Path(args[2])


def launch(
    argv: list[str], processes: int = 1, script: Path | None = None, seconds: int = 400, **environment: str
) -> subprocess.CompletedProcess:
    """Runs the entry point (or `script`) in processes of its own, and ends them all where they hang."""
    program = ["-m", "open_r1.sft"] if script is None else [str(script)]
    if processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *program]
    return execute([sys.executable, *program, *argv], seconds, **environment)


def execute(command: list[str], seconds: int = 400, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def logged(output: Path, name: str = "loss") -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [row[name] for row in state["log_history"] if name in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def part_of(key: str) -> str:
    """`mm_projector`, `bert_model`, ... or `language_model`."""
    first = key.removeprefix("model.").partition(".")[0]
    return "language_model" if first in ("embed_tokens", "layers", "norm", "lm_head") else first


def changed_parts(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    return {part_of(key) for key in old if not torch.equal(old[key].float(), new[key].float())}


# --- one data set, many launches ---


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, mixed, tmp_path_factory) -> Path:
    """One process, batches of four, nothing recomputed."""
    return train(
        tiny_checkpoint,
        mixed,
        tmp_path_factory.mktemp("reference"),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4,
        gradient_checkpointing="false",
        eval_data=mixed,
        eval_strategy="steps",
        eval_steps=5,
    )


def test_the_recipe_s_schedule_and_parts(reference, tiny_checkpoint):
    losses = logged(reference)
    assert len(losses) == 5 and losses[-1] < losses[0]
    # warmup: 3 % of 5 steps, rounded up; then a cosine to zero
    cosine = [3e-3 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert logged(reference, "learning_rate") == pytest.approx([0, *cosine])
    assert logged(reference, "eval_loss")[0] < losses[0]
    assert all(rate > 0 for rate in logged(reference, "tokens_per_second"))
    trained = {"language_model", "mm_projector", "audio_projector", "bert_gate"}
    assert changed_parts(tiny_checkpoint, reference) == trained
    assert {weight.dtype for weight in weights(reference).values()} == {torch.float32}


@pytest.mark.parametrize("recipe", ["cold_start", "sft", "release/cold_start", "release/sft"])
def test_recipes_hold_the_paper_s_figures(recipe, tmp_path):
    argv = ["--config", str(REPOSITORY / f"configs/{recipe}.yaml"), "--model_path", "m", "--data", "d"]
    argv += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--tf32", "false"]
    data, model, ours = parse_arguments((sft.DataArguments, ModelArguments, SFTConfig), argv)
    assert (ours.learning_rate, ours.lr_scheduler_type, ours.weight_decay) == (2e-5, "cosine", 0)
    assert ours.get_warmup_steps(1000) == 30
    assert (ours.max_length, ours.gradient_checkpointing) == (2048, True)
    batch = 8 * ours.per_device_train_batch_size * ours.gradient_accumulation_steps
    assert (ours.num_train_epochs, batch) == ((5, 16) if "cold_start" in recipe else (1, 128))
    released = recipe.startswith("release")
    assert (data.prompt_style, model.reinit_gate) == (("release", True) if released else ("inference", False))


def test_accumulation_and_gradient_checkpointing_change_nothing(reference, tiny_checkpoint, mixed, tmp_path):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true"}
    train(tiny_checkpoint, mixed, tmp_path, train_sampling_strategy="sequential", **changes)
    assert logged(tmp_path) == pytest.approx(logged(reference), abs=1e-4)


@pytest.mark.parametrize("sharding", ["ddp", "zero2"])
def test_two_processes_give_the_same_losses(sharding, reference, tiny_checkpoint, mixed, tmp_path):
    argv = options(tiny_checkpoint, mixed, tmp_path, train_sampling_strategy="sequential")
    done = launch([*argv, *ZERO.get(sharding, [])], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path) == pytest.approx(logged(reference), abs=1e-4)


def test_the_threads_of_an_exchange_cannot_abort_a_finished_run(tmp_path):
    """Without `leave`, every second run dies of SIGABRT here: gloo waits for a lock that an ending Python keeps."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys, torch\n"
        "import torch.distributed as dist\n"
        "from open_r1.training import run\n"
        "def main():\n"
        "    dist.init_process_group('gloo')\n"
        "    atexit.register(os.write, 1, b'exit functions ran\\n')\n"
        "    sys.setswitchinterval(100)\n"
        "    dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.ones(3))\n"
        "class Witness:\n"
        "    def __del__(self, write=os.write):\n"
        "        write(1, b'interpreter torn down\\n')\n"
        "witness = Witness()\n"
        "run(main)\n"
    )
    done = launch([], processes=2, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "exit functions ran\n" * 2


def test_zero3_gives_the_same_losses_also_when_killed_and_resumed(reference, tiny_checkpoint, mixed, tmp_path):
    argv = options(tiny_checkpoint, mixed, tmp_path, train_sampling_strategy="sequential")
    argv += [*ZERO["zero3"], "--save_strategy", "steps", "--save_steps", "2"]
    killed = launch(argv, processes=2, script=WORKER, KILL_AT="file:checkpoint-4/rng_state_1.pth", KILL_RANK="1")
    assert killed.returncode != 0
    assert (tmp_path / "checkpoint-4/model.safetensors").exists()
    assert not (tmp_path / "checkpoint-4/trainer_state.json").exists()  # the first process waited for the second
    done = launch(argv, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("checkpoint-4 is passed over") == done.stderr.count("resuming from") == 1
    assert logged(tmp_path) == pytest.approx(logged(reference), abs=1e-4)
    ours, theirs = weights(tmp_path), weights(reference)
    assert ours.keys() == theirs.keys()
    worst = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
    assert worst < 1e-3, worst


def test_cached_features_need_neither_towers_nor_clips(reference, tiny_checkpoint, mixed, tmp_path):
    cache = tmp_path / "cache"
    made = ["--model_path", tiny_checkpoint, "--data", mixed, "--data_folder", mixed.parent, "--out", cache]
    assert cache_features.main([*map(str, made), "--device", "cpu"]) == 0
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    for tower in ("vision_tower", "audio_tower"):
        (checkpoint / tower / "model.safetensors").unlink()
    train(
        checkpoint,
        write_list(tmp_path / "list.json", json.loads(mixed.read_text())),  # beside which there is no clip
        tmp_path / "out",
        feature_cache=cache,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4,
    )
    assert logged(tmp_path / "out") == pytest.approx(logged(reference), abs=5e-3)


# --- kill and resume ---


TOWER_TOO = {
    "trainable_parts": ["mm_projector", "audio_projector", "bert_gate", "language_model", "vision_tower"],
    "projector_learning_rate": "1e-3",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 4,
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, mixed, tmp_path_factory) -> Path:
    """Six steps in random order, a tower trained too, the projectors at a rate of their own."""
    return train(tiny_checkpoint, mixed, tmp_path_factory.mktemp("uninterrupted"), **TOWER_TOO)


def test_a_run_killed_three_times_ends_as_if_it_had_not_been(uninterrupted, tiny_checkpoint, mixed, tmp_path, caplog):
    argv = options(tiny_checkpoint, mixed, tmp_path, **TOWER_TOO)
    moments = ["step:4", "file:checkpoint-4/optimizer.pt", "file:checkpoint-6/trainer_state.json"]
    for moment, resumed_from, passed_over in zip(moments, [None, 2, 2], [None, None, 4], strict=True):
        killed = launch(argv, script=WORKER, KILL_AT=moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert ("resuming from" in killed.stderr) == (resumed_from is not None)
        assert resumed_from is None or f"checkpoint-{resumed_from}\n" in killed.stderr
        assert ("passed over" in killed.stderr) == (passed_over is not None)
        assert passed_over is None or f"checkpoint-{passed_over} is passed over" in killed.stderr
    caplog.clear()
    train(tiny_checkpoint, mixed, tmp_path, **TOWER_TOO)
    assert "checkpoint-6 is passed over" in caplog.text
    assert "trainer_state.json is missing or cut short" in caplog.text
    assert f"resuming from {tmp_path / 'checkpoint-4'}" in caplog.text
    assert "missing keys" not in caplog.text
    assert logged(tmp_path) == pytest.approx(logged(uninterrupted), abs=1e-6)
    ours, theirs = weights(tmp_path), weights(uninterrupted)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_a_trained_tower_is_saved_and_loaded_again(uninterrupted, tiny_checkpoint):
    tower = "model.vision_tower.vision_tower."
    trained = {key: weight for key, weight in weights(uninterrupted).items() if key.startswith(tower)}
    before = weights(tiny_checkpoint / "vision_tower")
    assert any(not torch.equal(trained[tower + key], before[key].float()) for key in before)
    model, _ = humanomni.load_pretrained(uninterrupted, device="cpu")
    for key, weight in model.state_dict().items():
        if key.startswith(tower):
            torch.testing.assert_close(weight, trained[key])


def test_projectors_have_a_learning_rate_of_their_own(uninterrupted):
    optimizer = torch.load(uninterrupted / "checkpoint-2" / "optimizer.pt", weights_only=True)
    groups = optimizer["param_groups"]
    assert {group["initial_lr"] for group in groups} == {3e-3, 1e-3}
    assert {group["weight_decay"] for group in groups} == {0.0}
    names = {part_of(key) for key in weights(uninterrupted)} - {"bert_model", "audio_tower"}
    own = sum(len(group["params"]) for group in groups if group["initial_lr"] == 1e-3)
    projectors = {"mm_projector", "audio_projector", "bert_gate"} & names
    assert own == sum(part_of(key) in projectors for key in weights(uninterrupted))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("trainer_state.json", "trainer_state.json is missing or cut short"),
        ("model.safetensors", "model.safetensors is cut short"),
        ("optimizer.pt", "optimizer.pt is cut short"),
        ("scheduler.pt", "scheduler.pt is cut short"),
        ("rng_state.pth", "rng_state.pth is cut short"),
    ],
)
def test_half_written_checkpoints_are_told_from_whole_ones(file, told, uninterrupted, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(uninterrupted / "checkpoint-2", checkpoint)
    assert what_is_missing(checkpoint) is None
    for size in (checkpoint.joinpath(file).stat().st_size - 2, 0):
        os.truncate(checkpoint / file, size)
        assert what_is_missing(checkpoint) == told
    if file in ("trainer_state.json", "model.safetensors", "optimizer.pt"):
        checkpoint.joinpath(file).unlink()
        assert what_is_missing(checkpoint) is not None


def test_resume_from_checkpoint_takes_a_folder_true_or_false(uninterrupted, tmp_path):
    def asked(value: str) -> str | None:
        arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, resume_from_checkpoint=value)
        return checkpoint_to_resume(arguments)

    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "checkpoint-2")
    assert asked("false") is None
    assert asked("true") == asked(None) == str(tmp_path / "checkpoint-2")
    assert asked(str(uninterrupted / "checkpoint-4")) == str(uninterrupted / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"nowhere is not whole: trainer_state\.json is missing"):
        asked(str(tmp_path / "nowhere"))


# --- LoRA ---


LORA = {"use_lora": "true", "lora_r": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def test_lora_resumes_exactly_and_its_merged_export_is_the_same_model(tiny_checkpoint, mixed, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny_checkpoint, mixed, whole, **LORA)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(tiny_checkpoint, mixed, resumed, **LORA)  # dropout draws the same numbers again
    assert logged(resumed) == pytest.approx(logged(whole), abs=1e-6)

    merged, processor = humanomni.load_pretrained(whole / "merged", device="cpu")
    base, _ = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    before = base.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with_adapters = PeftModel.from_pretrained(base, whole).eval()
    batch = SupervisedCollator(processor, data_folder=mixed.parent)(json.loads(mixed.read_text())[:4])
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, with_adapters(**batch).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    trained = {"language_model", "mm_projector", "audio_projector", "bert_gate"}
    assert changed_parts(tiny_checkpoint, whole / "merged") == trained
    assert weights(whole / "merged").keys() == weights(tiny_checkpoint).keys()


@pytest.mark.slow
def test_lora_under_zero3_exports_the_same_model(tiny_checkpoint, mixed, tmp_path):
    changes = {"use_lora": "true", "lora_dropout": 0, "max_steps": 2, "train_sampling_strategy": "sequential"}
    train(tiny_checkpoint, mixed, tmp_path / "one", **changes, per_device_train_batch_size=4)
    argv = options(tiny_checkpoint, mixed, tmp_path / "two", **changes)
    done = launch([*argv, *ZERO["zero3"]], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-4)
    ours, theirs = weights(tmp_path / "two/merged"), weights(tmp_path / "one/merged")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-3)


# --- what trains ---


def test_frozen_encoders_take_no_part_in_the_backward_pass(tiny_checkpoint, clips):
    """Gradient checkpointing lets all embeddings ask for gradients, those of the towers and BERT too."""
    model, processor = load_for_training(ModelArguments(str(tiny_checkpoint)))
    model.train()
    model.activation_checkpointing_enable()
    batch = SupervisedCollator(processor, data_folder=clips)([entry("both", "sad")])
    text = ("input_ids", "attention_mask", "labels")
    features = model.model.encode(**{name: value for name, value in batch.items() if name not in text})
    assert set(features) == {"video_features", "audio_features", "query_features"}
    assert not any(feature.requires_grad for feature in features.values())


def test_a_tower_cannot_train_under_deepspeed_where_some_samples_lack_its_media():
    samples = [Sample(("<video>\nq", "a"), video="v"), Sample(("q", "a"), origin="list.json, sample 1")]
    model = ModelArguments("m", trainable_parts=["vision_tower"])
    two = SimpleNamespace(deepspeed="zero3.json", world_size=2)
    with pytest.raises(DataError, match=r"vision_tower trains, but 1 samples hold none of .* sample 1 first"):
        sft.check_trained_towers(model, two, samples)
    sft.check_trained_towers(model, two, samples[:1])
    sft.check_trained_towers(model, SimpleNamespace(deepspeed=None, world_size=2), samples)
    sft.check_trained_towers(ModelArguments("m"), two, samples)


def test_only_the_chosen_part_trains_and_text_alone_is_enough(tiny_checkpoint, clips, tmp_path):
    data = write_list(clips / "sound.json", [entry("sound", "sad"), entry("text", "glad")])
    train(tiny_checkpoint, data, tmp_path, trainable_parts="audio_projector", max_steps=2)
    assert changed_parts(tiny_checkpoint, tmp_path) == {"audio_projector"}


def test_reinit_gate_takes_bert_from_its_folder_and_a_new_gate(tiny_checkpoint, clips, tmp_path):
    bert = tmp_path / "bert"
    shutil.copytree(tiny_checkpoint / "bert", bert)
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(bert)
    data = write_list(clips / "both.json", [entry("both", "sad")])
    # the first step of a warmup has a learning rate of zero
    changes = {"reinit_gate": "true", "bert_model": bert, "max_steps": 1}
    first = weights(train(tiny_checkpoint, data, tmp_path / "first", **changes))
    again = weights(train(tiny_checkpoint, data, tmp_path / "again", **changes))
    other = weights(train(tiny_checkpoint, data, tmp_path / "other", **changes, seed=7))
    for key, weight in load_file(bert / "model.safetensors").items():
        assert torch.equal(first[f"model.bert_model.{key}"], weight)
    gate = "model.bert_gate.0.weight"
    assert not torch.allclose(first[gate], weights(tiny_checkpoint)[gate].float())
    bound = first[gate].shape[1] ** -0.5  # torch's own initialisation
    assert 0.9 * bound < first[gate].abs().max() <= bound
    assert torch.equal(first[gate], again[gate]) and not torch.equal(first[gate], other[gate])
    with pytest.raises(CheckpointError, match=r"reinit_gate reads BERT anew, but .* does not load"):
        sft.main(options(tiny_checkpoint, data, tmp_path / "none", reinit_gate="true"))


# --- bad clips ---


@pytest.fixture(scope="module")
def one_bad(clips) -> Path:
    """In order, two processes and two samples each: the broken clip is the second process's, in the first step."""
    kinds = ["both", "video", "both", "both", "both", "text", "video", "both"]
    entries = [entry(kind, "sad") for kind in kinds]
    entries[3]["video"] = "broken.mp4"
    return write_list(clips / "one_bad.json", entries)


def test_a_clip_that_does_not_read_is_skipped_on_its_process_alone(one_bad, tiny_checkpoint, tmp_path):
    changes = {"on_bad_sample": "skip", "max_steps": 2, "train_sampling_strategy": "sequential"}
    done = launch(options(tiny_checkpoint, one_bad, tmp_path, **changes), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (tmp_path / "bad_samples.rank1.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert noted["clip"] == "broken.mp4" and noted["sample"].endswith("sample 3") and "broken.mp4" in noted["reason"]
    assert not (tmp_path / "bad_samples.rank0.jsonl").exists()
    assert "1 samples were skipped on process 1" in done.stderr
    assert len(logged(tmp_path)) == 2


def test_a_clip_that_does_not_read_stops_all_processes_with_its_name(one_bad, tiny_checkpoint, tmp_path):
    changes = {"max_steps": 2, "train_sampling_strategy": "sequential", "dataloader_num_workers": 1}
    done = launch(options(tiny_checkpoint, one_bad, tmp_path, **changes), processes=2)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        "sample 3" in told and "broken.mp4" in told and told.endswith("pass --on_bad_sample skip to go on without it")
    )


# ----------------------------------------------------------------------------------------------- end to end, the log


def test_overfits_and_the_result_answers_as_trained(tiny_checkpoint, clips, tmp_path, capsys, recwarn):
    answers = {"example.mp4": "<think>Bars.</think>\n<answer>happy</answer>", "clip.mp4": "<answer>sad</answer>"}
    data = write_list(clips / "two.json", [entry("both", answer, video=clip) for clip, answer in answers.items()])
    train(
        tiny_checkpoint,
        data,
        tmp_path,
        max_steps=40,
        learning_rate="5e-3",
        max_grad_norm=5,
        report_to=["tensorboard"],
        save_strategy="steps",
        save_steps=25,
    )
    losses = logged(tmp_path)
    assert losses[-1] < losses[0] / 10
    stdout, stderr = capsys.readouterr()
    report, labels, ending = stdout.splitlines()
    assert report.startswith(f"{data}: 2 samples, 0.00 hours, ")
    assert labels == "labels: happy 1, sad 1"
    assert ending.startswith("40 steps, loss ") and ending.endswith(f": {tmp_path}")
    assert "40/40" in stderr and "loss=" in stderr and "lr=" in stderr and "tok/s=" in stderr
    assert "{'" not in stdout + stderr and "Warning" not in stderr
    assert not [warning for warning in recwarn if "is deprecated and will be removed in v6" in str(warning.message)]

    model, processor = humanomni.load_pretrained(tmp_path, device="cpu")
    assert weights(tmp_path).keys() == weights(tiny_checkpoint).keys()
    for clip, answer in answers.items():
        inputs = processor("Which emotion is it?", clips / clip, modal="video_audio", image_aspect_ratio="pad")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        assert processor.tokenizer.decode(output[0], skip_special_tokens=True).endswith(answer)

    written = {path.name for path in tmp_path.iterdir()}
    assert {"training_curves.png", "config_resolved.yaml", "environment.json", "tokenizer_config.json"} <= written
    assert Image.open(tmp_path / "training_curves.png").size[0] > 500
    assert yaml.safe_load((tmp_path / "config_resolved.yaml").read_text())["learning_rate"] == 5e-3
    assert "torch" in json.loads((tmp_path / "environment.json").read_text())["packages"]
    assert [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size > 500]


def script(name: str, checkpoint: Path, data: Path, output: Path, *words: str, **environment: str):
    names = {"MODEL_PATH": checkpoint, "DATA": data, "DATA_FOLDER": data.parent, "OUTPUT": output}
    variables = {**{name: str(value) for name, value in names.items()}, "PYTHON": sys.executable, **environment}
    return execute(["bash", str(REPOSITORY / "scripts" / name), *words], **variables)


def test_train_sft_script_on_a_cpu_in_bf16(tiny_checkpoint, mixed, tmp_path):
    words = ["--bf16", "true", "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    done = script("train_sft.sh", tiny_checkpoint, mixed, tmp_path, *words, LAUNCH="cpu", NPROC="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{mixed}: 20 samples")
    assert all(math.isfinite(loss) for loss in logged(tmp_path)) and len(logged(tmp_path)) == 2
    shown = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert shown[0].startswith("+ ") and all("it/s" in line or "s/it" in line for line in shown[1:]), done.stderr


def test_released_cold_start_recipe_under_zero3_in_bf16(tiny_checkpoint, mixed, tmp_path):
    bert = tmp_path / "bert"
    shutil.copytree(tiny_checkpoint / "bert", bert)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(bert)
    done = script(
        "train_cold_start.sh",
        tiny_checkpoint,
        mixed,
        tmp_path / "out",
        *["--bf16", "true", "--max_steps", "1", "--bert_model", str(bert)],
        LAUNCH="cpu+zero3",
        NPROC="2",
        CONFIG="configs/release/cold_start.yaml",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = weights(tmp_path / "out")
    assert ours.keys() == weights(tiny_checkpoint).keys()
    for key, weight in load_file(bert / "model.safetensors").items():
        torch.testing.assert_close(ours[f"model.bert_model.{key}"].float(), weight, rtol=1e-2, atol=1e-2)
    gate = "model.bert_gate.0.weight"
    assert not torch.allclose(ours[gate].float(), weights(tiny_checkpoint)[gate].float())
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("value", ["gpu", "cpu+zero", "zero4"])
def test_a_wrong_launch_is_told_in_one_line(value, tiny_checkpoint, mixed, tmp_path):
    done = script("train_sft.sh", tiny_checkpoint, mixed, tmp_path, LAUNCH=value)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: LAUNCH is '{value}'; pass cpu, ddp, zero2 or zero3, or cpu+ddp, cpu+zero2, cpu+zero3"
    ]


# --- mistakes ---


def mistake(capsys, argv: list[str]) -> str:
    """What the entry point tells about wrong options; it must be one line, and status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sft.main(argv))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_lenght": 10}, "unknown options: --max_lenght 10; --help lists the known ones"),
        ({"max_length": "long"}, "invalid int value: 'long'; --help lists the options"),
        ({"trainable_parts": "tongue"}, "trainable_parts holds 'tongue'; it takes mm_projector, audio_projector"),
        ({"optim": "adamw_bnb_8bit"}, "which needs bitsandbytes; pip install bitsandbytes"),
        ({"max_length": 100_000}, "max_length 100000 is over the model's context of 32768 tokens"),
        ({"prompt_style": "poem"}, "prompt_style is 'poem'; pass one of inference, release"),
        ({"too_long": "cut"}, "too_long is 'cut'; pass truncate_text or drop"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample is 'ignore'; pass error or skip"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown; pass auto, float32, bfloat16, float16"),
        ({"data": "nowhere.json"}, "nowhere.json does not exist; pass the list of samples with --data"),
        ({"model_path": "nowhere"}, "nowhere"),
        ({"feature_cache": "nowhere"}, "nowhere is no feature cache"),
        ({"feature_cache": "x", "trainable_parts": "vision_tower"}, "but feature_cache leaves the towers out"),
        ({"use_lora": "true", "trainable_parts": ["language_model", "bert"]}, "trainable_parts holds bert, which"),
        ({"use_lora": "true", "trainable_parts": "bert_gate"}, "add language_model"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
        ({"config": "nowhere.yaml"}, "the file of --config does not read: [Errno 2]"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, told, tiny_checkpoint, mixed, tmp_path, capsys):
    if "bitsandbytes" in told and shutil.which("nvidia-smi"):
        pytest.skip("bitsandbytes may be installed")
    words = options(tiny_checkpoint, mixed, tmp_path)
    for name, value in changes.items():  # the last one wins
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    line = mistake(capsys, words)
    assert line.startswith("error: ") and told in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat: 1.0e-5\n", "unknown options: --learning_rat 1e-05; --help lists the known ones"),
        ("a: [\n", "is not YAML"),
        ("- a\n- b\n", "must contain a YAML mapping"),
        ("trainable_parts: [ear]\n", "trainable_parts holds 'ear'"),
    ],
)
def test_mistakes_in_the_yaml_file_are_told_in_one_line(text, told, tiny_checkpoint, mixed, tmp_path, capsys):
    config = tmp_path / "recipe.yaml"
    config.write_text(text)
    line = mistake(capsys, options(tiny_checkpoint, mixed, tmp_path, config=config))
    assert line.startswith("error: ") and told in line


def test_missing_options_are_told_and_help_lists_all(capsys):
    assert mistake(capsys, []).startswith("error: the following arguments are required: --data, --model_path")
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--trainable_parts", "--feature_cache", "--learning_rate"))


def test_config_may_be_joined_by_an_equals_sign(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainable_parts: bert_gate\nmodel_path: m\ndata: d\nuse_cpu: true\nbf16: false\n")
    classes = (sft.DataArguments, ModelArguments, SFTConfig)
    data, model, ours = parse_arguments(classes, [f"--config={recipe}", "--data=e", "--output_dir", str(tmp_path)])
    assert (data.data, model.trainable_parts, ours.use_cpu) == ("e", ["bert_gate"], True)
    with pytest.raises(HumanOmniError, match="does not read"):
        parse_arguments(classes, ["--config=nowhere.yaml"])


def test_hours_count_each_sample_s_part_of_its_clip(clips):
    def sample(**media) -> Sample:
        return Sample(("q", "a"), **media)

    assert total_seconds([sample(video="example.mp4")], clips) == pytest.approx(4, abs=0.2)
    parts = [sample(video="example.mp4", start=1, end=3), sample(video="example.mp4", start=3, end=99)]
    assert total_seconds(parts, clips) == pytest.approx(3, abs=0.2)
    silent = [sample(), sample(image="face.png"), sample(video="broken.mp4"), sample(audio="sound.wav")]
    assert total_seconds(silent, clips) == pytest.approx(1.5, abs=0.1)
