"""Builds the checkpoint that the miniature's trainings start from: trained towers, everything else at random.

    python -m open_r1.mini.checkpoint WORLD OUTPUT [--seed 0]

The towers learn, one frame and one sound at a time, to tell the cues of the world's `base` clips from each other, as
SigLIP and Whisper come trained on other things than emotions. From here on they are frozen. OUTPUT is a checkpoint in
the release's format, with a small tokenizer and BERT of its own; it appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from humanomni.errors import CheckpointError, exit_status
from humanomni.modeling import HumanOmniQwen2ForCausalLM
from humanomni.processing import HumanOmniProcessor
from humanomni.tiny import Geometry, whole_folder, write_small_files
from open_r1.mini.cues import PICTURE_CUES, SOUND_CUES, Scene
from open_r1.mini.texts import corpus
from open_r1.mini.world import clip_name, read_scenes

GEOMETRY = Geometry(
    vision_hidden=64,
    vision_ffn=128,
    vision_layers=4,  # the last one is not read
    audio_hidden=64,
    audio_ffn=128,
    audio_heads=4,
    mel_bins=40,
    audio_seconds=2,
    bert_vocab_size=1024,
    hidden=128,
    ffn=256,
    layers=4,
    vocab_size=896,
    num_frames=4,
    start_end=False,  # marks of five tokens each would lengthen the prompt by a fifth
)
TEXT_PIECES = 840
FRAMES_OF_CLIP = (0, 2)  # of a clip's frames, those that the vision tower learns from
LEVELS = 3
MOST_CLIPS = 4000  # to learn from
HELD_OUT = 0.06  # of the clips, to tell how well the towers tell the cues
BATCH, FRAME_BATCH, LEARNING_RATE = 64, 128, 2e-3


def build(world: Path, output: Path, seed: int, sound_steps: int, picture_steps: int) -> None:
    """Writes the checkpoint of the module's docstring.

    Raises:
        HumanOmniError: `output` is there already, `world` is none, or a clip of it does not read.
    """
    if output.exists():
        raise CheckpointError(f"{output} is there already; name another folder or remove it")
    torch.manual_seed(seed)
    with whole_folder(output) as draft:
        config = write_small_files(draft, GEOMETRY, corpus(), TEXT_PIECES)
        model = HumanOmniQwen2ForCausalLM(config)
        processor = processor_of(draft, model)
        pictures, sounds, picture_levels, sound_levels = read_base_clips(world, processor)
        vision, audio = model.model.vision_tower.requires_grad_(True), model.model.audio_tower.requires_grad_(True)
        train_tower(audio, sounds, sound_levels, sound_steps, BATCH, list(SOUND_CUES))
        still_cues = list(PICTURE_CUES)[:4]  # a head's motion does not show in a single frame
        shown = pictures[:, FRAMES_OF_CLIP].unflatten(0, (-1, 1)).transpose(1, 2).flatten(0, 1)  # (2 N, 1, 3, h, w)
        levels = picture_levels[:, :4].repeat_interleave(len(FRAMES_OF_CLIP), 0)
        train_tower(vision, shown, levels, picture_steps, FRAME_BATCH, still_cues)
        model.save_pretrained(draft, save_towers=True)


def processor_of(folder: Path, model: HumanOmniQwen2ForCausalLM) -> HumanOmniProcessor:
    """The processor of a checkpoint whose weights are not written yet."""
    model.config.save_pretrained(folder)
    return HumanOmniProcessor.from_pretrained(folder)


def read_base_clips(
    world: Path, processor: HumanOmniProcessor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips of the split `base`, read as for training, and their cues.

    Returns:
        frames (N, T, 3, height, width) and log-mels (N, mel bins, frames), in half precision; the levels of the
        picture's and the sound's cues, (N, 5) each.
    """
    scenes = [scene for scene in read_scenes(world).values() if scene.split == "base"][:MOST_CLIPS]

    def read(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
        media = processor.load_media(world / clip_name(scene), "video_audio")
        return media.frames.half(), media.audio.half()

    with ThreadPoolExecutor() as threads:
        clips = list(tqdm(threads.map(read, scenes), total=len(scenes), desc="reading clips", unit="clip"))
    pictures, sounds = (torch.stack(part) for part in zip(*clips, strict=True))
    return (
        pictures,
        sounds,
        torch.tensor([scene.picture for scene in scenes]),
        torch.tensor([scene.sound for scene in scenes]),
    )


def train_tower(
    tower: nn.Module, inputs: torch.Tensor, levels: torch.Tensor, steps: int, batch_size: int, cues: list[str]
) -> None:
    """Trains a tower to tell the level of each cue, by linear heads on the mean and maximum of its features.

    Args:
        inputs: (N, ...), what `tower` takes.
        levels: (N, number of cues), 0 to 2.
    """
    width = tower(inputs[:1].float()).shape[-1]
    heads = nn.Linear(2 * width, len(cues) * LEVELS)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    held_out = max(1, round(HELD_OUT * len(inputs)))

    def logits(rows: torch.Tensor) -> torch.Tensor:  # (B, cues, LEVELS)
        features = tower(inputs[rows].float()).flatten(1, -2)  # (B, tokens, D)
        return heads(torch.cat([features.mean(1), features.amax(1)], 1)).unflatten(1, (len(cues), LEVELS))

    name = type(tower).__name__
    bar = tqdm(range(steps), desc=name, unit="step")
    for rows in shuffled_batches(len(inputs) - held_out, batch_size, steps):
        loss = F.cross_entropy(logits(rows).flatten(0, 1), levels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    with torch.no_grad():
        parts = torch.arange(len(inputs) - held_out, len(inputs)).split(batch_size)
        right = torch.cat([logits(rows).argmax(-1) == levels[rows] for rows in parts]).float().mean(0)
    told = ", ".join(f"{cue} {100 * share:.0f} %" for cue, share in zip(cues, right.tolist(), strict=True))
    print(f"{name}, cues told right on {held_out} held-out inputs: {told}", flush=True)


def shuffled_batches(count: int, size: int, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches of indices below `count`, each index once before any comes again."""
    order = torch.randperm(count)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:size]
        order = order[size:]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m open_r1.mini.checkpoint", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("world", type=Path, help="folder made by open_r1.mini.world")
    add("output", type=Path, help="folder of the checkpoint; must not exist")
    add("--seed", type=int, default=0, help="of the weights and the order of the clips (default: %(default)s)")
    add("--sound_steps", type=int, default=500, help="of the audio tower's training (default: %(default)s)")
    add("--picture_steps", type=int, default=1800, help="of the vision tower's training (default: %(default)s)")
    options = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    return exit_status(
        lambda: build(options.world, options.output, options.seed, options.sound_steps, options.picture_steps)
    )


if __name__ == "__main__":
    sys.exit(main())
