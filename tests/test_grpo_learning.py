"""GRPO learns: the label is in the picture or in the sound, and the reward finds it there."""

import random

import numpy as np
import pytest
import torch
from media_factory import write_wave
from PIL import Image
from trl import GRPOConfig

import humanomni
from humanomni.modeling import RAW_MEDIA
from humanomni.prompts import THINK_SENTENCE
from humanomni.tiny import Geometry, build_checkpoint
from open_r1.data import Sample, SupervisedCollator
from open_r1.grpo import as_dataset
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.trainer.grpo_trainer import HumanOmniGRPOTrainer
from open_r1.training import set_trainable

LABELS = ("happy", "sad", "angry", "fear")
COLOURS = ((220, 30, 30), (30, 30, 220), (30, 200, 30), (230, 230, 230))
WELL_FORMED = "<think>x</think><answer>{}</answer>"


def make_clips(folder) -> list[Sample]:
    """For each label two pictures of its colour (as videos of two frames) and two sounds of its kind."""
    noise = np.random.default_rng(0)
    time = np.arange(30 * 16000) / 16000  # the whole window: what Whisper hears is then not mostly silence
    sounds = (
        np.sin(2 * np.pi * 150 * time),
        np.sin(2 * np.pi * 4000 * time),
        noise.normal(0, 0.5, len(time)),
        np.sin(2 * np.pi * 800 * time) * (np.sin(2 * np.pi * 3 * time) > 0),
    )
    samples = []
    for label, colour, sound in zip(LABELS, COLOURS, sounds, strict=True):
        for copy in range(2):
            frames = folder / f"{label}{copy}"
            frames.mkdir()
            for number in range(2):
                pixels = np.clip(np.full((48, 48, 3), colour) + noise.normal(0, 8, (48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(frames / f"{number}.png")
            heard = write_wave(folder / f"{label}{copy}.wav", (0.2 + 0.1 * copy) * sound, 16000)
            samples += [asked({"video": str(frames)}, label), asked({"audio": str(heard)}, label)]
    return samples


def asked(media: dict, label: str) -> Sample:
    question = f"<{next(iter(media))}>\nFelt?  {THINK_SENTENCE}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": label}]
    return Sample.parse({**media, "conversations": turns})


def cold_start(model, processor, samples: list[Sample], steps: int) -> None:
    """Teaches the format alone: the answers are drawn at random, so nothing can be learnt about the clips."""
    draw = random.Random(0)
    batches = []
    for _ in range(8):
        turns = [(sample.turns[0], WELL_FORMED.format(draw.choice(LABELS))) for sample in samples]
        rows = [Sample(turn, video=s.video, audio=s.audio) for turn, s in zip(turns, samples, strict=True)]
        batch = SupervisedCollator(processor)(rows)
        raw = {name: batch.pop(name) for name in RAW_MEDIA if name in batch}
        with torch.no_grad():
            batches.append({**batch, **model.model.encode(**raw)})
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    model.train()
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_reward_rises_from_chance_to_where_the_label_is(tmp_path):
    torch.manual_seed(0)
    checkpoint = build_checkpoint(tmp_path / "model", geometry=Geometry(num_frames=2))
    model, processor = humanomni.load_pretrained(checkpoint, device="cpu")
    set_trainable(model, ["mm_projector", "audio_projector", "bert_gate", "language_model"])
    samples = make_clips(tmp_path)
    cold_start(model, processor, samples, steps=200)
    model.save_pretrained(tmp_path / "cold")
    processor.save_pretrained(tmp_path / "cold")
    model, processor = humanomni.load_pretrained(tmp_path / "cold", device="cpu")
    set_trainable(model, ["mm_projector", "audio_projector", "bert_gate", "language_model"])

    trainer = HumanOmniGRPOTrainer(
        model=model,
        reward_funcs=[accuracy_reward, format_reward],
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=40,
            max_steps=70,
            learning_rate=1.5e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            beta=0.0,
            temperature=1.0,
            loss_type="grpo",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=as_dataset(samples),
        processing_class=processor,
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert np.mean(rewards[:3]) < 1.45  # format and chance: 1 + 1/4
    assert np.mean(rewards[-10:]) > 1.6
