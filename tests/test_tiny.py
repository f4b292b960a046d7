"""The untrained checkpoints are the same everywhere, complete, quiet to load and in the release's format."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import humanomni
from humanomni.tiny import (
    LABEL_FILE,
    MEDIUM,
    TEXT_SPECIALS,
    TINY,
    build_checkpoint,
    configuration,
    main,
    seeded_weight,
)

FRAMES = np.random.default_rng(1).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
WAVE = np.sin(np.arange(16000) / 9).astype(np.float32)


def batches(processor) -> list[dict]:
    return [processor("What?", FRAMES, "video"), processor("What?", WAVE, "audio")]


def logits(model, processor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches(processor)]


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pattern(keys) -> set[str]:
    """Key names with every layer's number as one sign."""
    return {re.sub(r"\.(layers?)\.\d+\.", r".\1.N.", key) for key in keys}


def test_a_seed_gives_the_same_files_in_another_process_and_place(tiny_checkpoint, tmp_path):
    torch.manual_seed(7)  # nothing may depend on torch's generator
    state = torch.random.get_rng_state()
    command = [sys.executable, "-m", "humanomni.tiny", str(tmp_path / "a" / "again")]
    subprocess.run(command, check=True, capture_output=True)
    assert files(tmp_path / "a" / "again") == files(tiny_checkpoint)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["again"]
    other = build_checkpoint(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = load_file(tiny_checkpoint / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_rule_itself_does_not_change():
    """Figures of numpy's PCG64 stream: another machine or release that draws others would change every reference."""
    weight = seeded_weight("model.layers.0.mlp.up_proj.weight", (3, 4), 0)
    assert weight.dtype == torch.bfloat16
    assert weight.flatten()[:3].tolist() == [0.9453125, 0.279296875, 0.78125]
    assert seeded_weight("norm.weight", (1000,), 0).float().mean().item() == pytest.approx(1, abs=0.02)
    assert seeded_weight("bias", (1000,), 0).float().std().item() == pytest.approx(0.1, rel=0.1)
    assert seeded_weight("fc.weight", (50, 400), 0).float().std().item() == pytest.approx(2 / 20, rel=0.05)


@pytest.fixture
def hear_transformers():
    """Lets pytest see what transformers logs."""
    transformers.logging.enable_propagation()
    yield
    transformers.logging.disable_propagation()


@pytest.mark.parametrize("tied", [True, False])
def test_it_loads_quietly_at_every_precision(tied, tmp_path, caplog, hear_transformers):
    folder = build_checkpoint(tmp_path / "checkpoint", geometry=dataclasses.replace(TINY, tied=tied))
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert ("lm_head.weight" in stored.keys()) != tied  # noqa: SIM118 (not a dict)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = {
            name: humanomni.load_pretrained(folder, dtype=name)[0] for name in ("float32", "bfloat16", "float16")
        }
        model, processor = humanomni.load_pretrained(str(folder))
        model.generate(**batches(processor)[0], max_new_tokens=2)
    assert caplog.records == []
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    wanted = loaded["float32"].state_dict()
    for name, other in loaded.items():
        assert other.dtype == getattr(torch, name)
        if name == "bfloat16":  # float16 cannot hold the smallest ones
            assert all(torch.equal(weight.float(), wanted[key]) for key, weight in other.state_dict().items())


def test_keys_are_those_of_a_released_checkpoint(golden, tmp_path):
    stored = json.loads((golden / "golden" / "keys.json").read_text())["a_saved_file"]
    folder = build_checkpoint(
        tmp_path / "checkpoint", geometry=dataclasses.replace(TINY, tied="lm_head.weight" not in stored)
    )
    ours = load_file(folder / "model.safetensors")
    assert pattern(ours) == pattern(stored)


@pytest.mark.parametrize("save_towers", [True, False])
def test_saving_and_loading_again_changes_nothing(save_towers, tiny_checkpoint, tmp_path):
    model, processor = humanomni.load_pretrained(tiny_checkpoint)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, save_towers=save_towers)
    processor.save_pretrained(saved)
    fields, before = (json.loads((folder / "config.json").read_text()) for folder in (saved, tiny_checkpoint))
    assert (fields["rope_theta"], fields["rope_scaling"]) == (1e6, None)
    assert fields["model_type"] == "HumanOmni_qwen2"
    towers = {name: fields.pop(name) for name in ("mm_vision_tower", "mm_audio_tower", "mm_bert")}
    if save_towers:
        assert towers == {name: before[name] for name in towers}
        assert all((saved / name / "config.json").is_file() for name in towers.values())
    else:
        assert towers == {name: str(tiny_checkpoint / before[name]) for name in towers}
    ours, theirs = load_file(saved / "model.safetensors"), load_file(tiny_checkpoint / "model.safetensors")
    assert {key: weight.shape for key, weight in ours.items()} == {key: w.shape for key, w in theirs.items()}

    moved = saved.rename(tmp_path / "moved")
    again, its_processor = humanomni.load_pretrained(moved)
    for one, other in zip(logits(model, processor), logits(again, its_processor), strict=True):
        assert torch.equal(one, other)


def test_the_auto_classes_know_it(tiny_checkpoint):
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    assert type(config) is humanomni.HumanOmniConfig
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor) is humanomni.HumanOmniProcessor
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    assert type(model) is humanomni.HumanOmniQwen2ForCausalLM
    expected = logits(*humanomni.load_pretrained(tiny_checkpoint))
    for one, other in zip(logits(model, processor), expected, strict=True):
        assert torch.equal(one, other)


def test_the_tokenizers_speak_the_release_s_dialect(tiny_checkpoint):
    _, processor = humanomni.load_pretrained(tiny_checkpoint)
    tokenizer = processor.tokenizer
    text = "A line.\n\n  Two spaces, Chinese 情感, an emoji \U0001f600 and e\u0301"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("e\u0301", "\u00e9")
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert max(tokenizer.get_vocab().values()) < TINY.vocab_size
    prompt, _ = processor.build_prompt("Why?", "text")
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    words = processor.bert_tokenizer("As an Emotional recognition expert zq 7!")["input_ids"]
    assert len(words) == 2 + 5 + 2 + 2 and processor.bert_tokenizer.unk_token_id not in words


def test_a_failed_build_leaves_nothing_and_a_stranger_s_folder_is_refused(tmp_path, monkeypatch, capsys):
    target = tmp_path / "checkpoint"
    with pytest.raises(humanomni.CheckpointError):
        build_checkpoint(target, geometry=dataclasses.replace(TINY, projector_type="unknown"))
    assert list(tmp_path.iterdir()) == []

    target.mkdir()
    build_checkpoint(target)  # an empty folder is free
    label = json.loads((target / LABEL_FILE).read_text())
    assert (label["seed"], label["geometry"]) == (0, dataclasses.asdict(TINY))
    assert main([str(target), "--seed", "3"]) == 0
    assert json.loads((target / LABEL_FILE).read_text())["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "config.json").write_text("{}")
    capsys.readouterr()
    assert main([str(stranger)]) == 2
    told = capsys.readouterr().err
    assert str(stranger) in told and told.count("\n") == 1
    assert files(stranger) == {"config.json": b"{}"}


def test_a_killed_build_leaves_no_folder_that_looks_whole(tmp_path):
    target = tmp_path / "checkpoint"
    die_before_the_last_step = (
        "import os, pathlib, sys; from humanomni.tiny import build_checkpoint;"
        "pathlib.Path.rename = lambda *_: os._exit(9); build_checkpoint(sys.argv[1])"
    )
    died = subprocess.run([sys.executable, "-c", die_before_the_last_step, str(target)], capture_output=True)
    assert died.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".checkpoint.unfinished-") and not (left / "config.json").exists()
    humanomni.load_pretrained(build_checkpoint(target))


def test_the_medium_geometry_has_the_parts_of_the_release():
    ids = {token: number for number, token in enumerate(TEXT_SPECIALS)}
    with torch.device("meta"):
        model = humanomni.HumanOmniQwen2ForCausalLM(configuration(MEDIUM, ids))
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.model.named_children()}
    assert counts["vision_tower"] == 92_884_224
    assert counts["bert_model"] == 109_482_240
    assert counts["mm_projector"] == 34_762_944
    assert counts["bert_gate"] == 2_766_851
    layer = (494_032_768 - 151_936 * 896 - 896) // 24  # of the released 0.5B language model
    assert counts["layers"] + counts["embed_tokens"] + counts["norm"] == 6 * layer + 32_000 * 896 + 896
    assert model.lm_head.weight is model.model.embed_tokens.weight
