"""Makes the world of the miniature: clips with picture and sound, lists of samples about them, and the truth.

    python -m open_r1.mini.world OUTPUT [--scale full|smoke] [--seed 0] [--face_bias 0.7] [--voice espeak|vowels]

OUTPUT then holds `clips/SPLIT/NUMBER.mp4`, lists in the sample format of docs/datasets.md, `truth.jsonl` with each
clip's cues, and `world.json` with the settings. The same seed gives the same lists. Clips that are there are kept, so
that the command continues what was interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import yaml
from tqdm import tqdm

from humanomni.errors import HumanOmniError, exit_status
from humanomni.prompts import EMOTION_QUESTION
from open_r1.mini.cues import PROTOTYPES, Population, Scene, draw_scene
from open_r1.mini.face import FRAMES_PER_SECOND, SIZE, FaceStyle, draw_face
from open_r1.mini.texts import (
    DESCRIBE,
    INTERPRET,
    THINK_QUESTION,
    conversation,
    crude_answer,
    description,
    explained_answer,
    interpretation,
)
from open_r1.mini.voice import RATE, VOICES, VoiceStyle, installed_voice, make_voice
from open_r1.prediction_files import to_line, write_json, write_whole

NOTE = "A drawn world to try the code in, and no judge of people's feelings."
TRUTH = "truth.jsonl"  # a line for each clip, with the fields of its `Scene`
SECONDS = 2.0  # of every clip
MIX = (0.35, 0.20, 0.15, 0.30)  # of the kinds of clips, see `open_r1.mini.cues.KINDS`
EVEN = dict.fromkeys(PROTOTYPES, 1.0)
# Shares of the classes: uneven as in the sets they are named after, but no class so rare that UAR were noise.
DFEW = Population({"happy": 20, "sad": 17, "neutral": 19, "angry": 15, "surprise": 11, "disgust": 8, "fear": 10}, MIX)
MAFW = Population(
    {
        "angry": 14, "disgust": 8, "fear": 8, "happy": 13, "neutral": 12, "sad": 13, "surprise": 10,
        "contemptuous": 5, "anxious": 8, "helpless": 5, "disappointed": 4,
    },
    MIX,
)  # fmt: skip
RAVDESS = Population(
    {"neutral": 7, "calm": 13, "happy": 13, "sad": 13, "angry": 13, "fear": 13, "disgust": 13, "surprise": 13},
    (0.25, 0.20, 0.20, 0.35),
)
BROAD = Population(EVEN, (0.25, 0.15, 0.15, 0.45))
EXPLAINED = Population(EVEN, MIX)

INDOORS = ((237, 194, 158), (158, 107, 76)), ((191, 209, 235), (235, 230, 204))  # skins, backgrounds
STAGE = ((115, 191, 128), (140, 153, 245)), ((38, 30, 51), (76, 25, 25))
FACES = {
    "in": FaceStyle(*INDOORS, (2.0, 2.3), (0.80, 0.95), 0.06, (0.055, 0.08), (0.0, 0.04), 0.16),
    "out": FaceStyle(*STAGE, (3.0, 5.0), (0.62, 0.80), 0.12, (0.045, 0.10), (0.04, 0.10), 0.20),
    "broad": FaceStyle(
        INDOORS[0] + STAGE[0], INDOORS[1] + STAGE[1], (1.8, 5.0), (0.60, 1.0), 0.12, (0.045, 0.10), (0.0, 0.10), 0.18
    ),
}
VOICE_STYLES = {
    "in": VoiceStyle(("f1", "f2", "f3"), (0.90, 1.12), (0.9, 1.1), (0.0, 0.004), 0.16),
    "out": VoiceStyle(("f4", "f5"), (0.80, 1.25), (1.2, 1.6), (0.004, 0.02), 0.20),
    "broad": VoiceStyle(("f1", "f2", "f3", "f4", "f5"), (0.80, 1.25), (0.8, 1.6), (0.0, 0.02), 0.18),
}


@dataclass(frozen=True)
class Split:
    """Clips drawn from one population in one style, in the numbers of a full and a smoke world."""

    population: Population
    style: str
    full: int
    smoke: int


SPLITS = {
    "base": Split(BROAD, "broad", 6000, 192),
    "cold_start": Split(EXPLAINED, "in", 580, 32),
    "dfew_train": Split(DFEW, "in", 1000, 16),
    "dfew_val": Split(DFEW, "in", 200, 8),
    "dfew_test": Split(DFEW, "in", 400, 16),
    "mafw_train": Split(MAFW, "in", 1000, 16),
    "mafw_val": Split(MAFW, "in", 200, 8),
    "mafw_test": Split(MAFW, "in", 400, 16),
    "ravdess_train": Split(RAVDESS, "out", 200, 8),
    "ravdess_test": Split(RAVDESS, "out", 400, 16),
}
SCALES = ("full", "smoke")
EMER_CLIPS = 232  # of the 580: answered in an open vocabulary; the others, HumanOmni's, by label
INTERPRETED_OF_BASE = 0.6  # share of the base's descriptions that say what each modality expresses
QUESTIONS_OF_BASE = 0.35  # share of the base's clips that are also asked for the emotion
MODALS_OF_BASE = {"video_audio": 0.6, "video": 0.2, "audio": 0.2}


def make_world(folder: Path, scale: str, seed: int, face_bias: float, voice: str, workers: int) -> None:
    """Writes the world of the module's docstring."""
    settings = {"scale": scale, "seed": seed, "face_bias": face_bias, "voice": voice}
    record = folder / "world.json"
    if record.exists() and json.loads(record.read_text("utf-8")) != settings:
        raise HumanOmniError(f"{folder} holds another world, see {record}; name another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)
    splits = {name: draw_scenes(name, scale, seed) for name in SPLITS}
    write_lists(folder, splits, seed, face_bias)
    scenes = [scene for split in splits.values() for scene in split]
    lines = (to_line({"clip": clip_name(scene), **asdict(scene)}) for scene in scenes)
    write_whole(folder / TRUTH, "".join(lines))
    make_clips(folder, scenes, seed, voice, workers)


def read_scenes(folder: Path) -> dict[str, Scene]:
    """Clip -> its truth.

    Raises:
        HumanOmniError: `folder` holds no world.
    """
    try:
        lines = (folder / TRUTH).read_text("utf-8").splitlines()
    except OSError as error:
        raise HumanOmniError(
            f"{folder} is no world ({error.strerror}); make one with python -m open_r1.mini.world"
        ) from error
    scenes = {}
    for line in lines:
        fields = json.loads(line)
        clip = fields.pop("clip")
        scenes[clip] = Scene(**{**fields, "picture": tuple(fields["picture"]), "sound": tuple(fields["sound"])})
    return scenes


def draw_scenes(name: str, scale: str, seed: int) -> list[Scene]:
    split = SPLITS[name]
    random = np.random.default_rng([seed, list(SPLITS).index(name)])
    return [draw_scene(split.population, random, name, index) for index in range(getattr(split, scale))]


def clip_name(scene: Scene) -> str:
    return f"clips/{scene.split}/{scene.index:05d}.mp4"


# ------------------------------------------------------------------------------------------------------------- lists


def write_lists(folder: Path, scenes: dict[str, list[Scene]], seed: int, face_bias: float) -> None:
    """The lists of samples; those of the label sets and of the cold start also as the two are mixed and compared."""
    lists = {name: label_list(split) for name, split in scenes.items() if name not in ("base", "cold_start")}
    lists["base"] = base_list(scenes["base"], seed)
    lists["cold_start"] = cold_start_list(scenes["cold_start"], seed, face_bias)
    lists["cold_start_unbiased"] = cold_start_list(scenes["cold_start"], seed, face_bias=0.0)
    for name in ("dfew_test", "mafw_test", "ravdess_test"):
        for modal in ("video", "audio"):
            lists[f"{name}_{modal}"] = label_list(scenes[name], modal)
    for name, entries in lists.items():
        write_json(folder / f"{name}.json", entries)
    for name, parts in (("train", ["dfew_train", "mafw_train"]), ("all", list(lists))):
        mixture = {"datasets": [{"json_path": f"{part}.json", "sampling_strategy": "all"} for part in parts]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False), "utf-8")


def label_list(scenes: list[Scene], modal: str = "video_audio") -> list[dict]:
    """The question for the emotion and its label."""
    return [conversation(EMOTION_QUESTION, modal, scene.label, clip_name(scene)) for scene in scenes]


def base_list(scenes: list[Scene], seed: int) -> list[dict]:
    """Descriptions of clips, often of one modality alone and often with what it expresses on its own, and crude
    answers to the question for the emotion, which no description weighs up."""
    random = np.random.default_rng([seed, 1000])
    modals, shares = list(MODALS_OF_BASE), list(MODALS_OF_BASE.values())
    entries = []
    for scene in scenes:
        modal = modals[random.choice(len(modals), p=shares)]
        if random.random() < INTERPRETED_OF_BASE:
            answer = interpretation(scene, modal, scene.picture_emotion, scene.sound_emotion)
            entries.append(conversation(INTERPRET, modal, answer, clip_name(scene)))
        else:
            entries.append(conversation(DESCRIBE, modal, description(scene, modal), clip_name(scene)))
        if random.random() < QUESTIONS_OF_BASE:
            modal = modals[random.choice(len(modals), p=shares)]
            answer = crude_answer(scene, modal, random)
            entries.append(conversation(EMOTION_QUESTION, modal, answer, clip_name(scene)))
    return entries


def cold_start_list(scenes: list[Scene], seed: int, face_bias: float) -> list[dict]:
    random = np.random.default_rng([seed, 2000])
    emer = round(len(scenes) * EMER_CLIPS / SPLITS["cold_start"].full)
    answers = [explained_answer(scene, face_bias, index < emer, random) for index, scene in enumerate(scenes)]
    return [
        conversation(THINK_QUESTION, "video_audio", answer, clip_name(scene))
        for scene, answer in zip(scenes, answers, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- clips


def make_clips(folder: Path, scenes: list[Scene], seed: int, voice: str, workers: int) -> None:
    """Writes the clips that are not there yet, `workers` at a time."""
    left = [scene for scene in scenes if not (folder / clip_name(scene)).exists()]
    for name in sorted({scene.split for scene in left}):
        (folder / "clips" / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(partial(write_clip, folder, seed, voice), left, chunksize=8)
        for _ in tqdm(done, total=len(left), desc="clips", unit="clip", disable=not left):
            pass  # the bar counts


def write_clip(folder: Path, seed: int, voice: str, scene: Scene) -> None:
    """One clip as H.264 and AAC in mp4; the file appears whole or not at all."""
    style = SPLITS[scene.split].style
    random = np.random.default_rng([seed, 3000, list(SPLITS).index(scene.split), scene.index])
    frames = draw_face(scene.picture, FACES[style], SECONDS, random)
    sound = make_voice(scene.sound, VOICE_STYLES[style], SECONDS, random, voice)
    target = folder / clip_name(scene)
    draft = target.with_name(f".{target.name}")
    encode_clip(draft, frames, sound)
    os.replace(draft, target)


def encode_clip(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Writes frames (T, SIZE, SIZE, 3) and samples to an mp4 file, in this process.

    A process of ffmpeg for each clip, as imageio-ffmpeg starts it, takes several times as long (docs/miniature.md).
    """
    with av.open(path, "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "23", "preset": "superfast"})
        picture.width, picture.height, picture.pix_fmt, picture.thread_count = SIZE, SIZE, "yuv420p", 1
        voice = container.add_stream("aac", rate=RATE, layout="mono", bit_rate=48000, options={"aac_coder": "fast"})
        for frame in frames:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(picture.encode())
        heard = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        heard.sample_rate = RATE
        container.mux(voice.encode(heard))
        container.mux(voice.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m open_r1.mini.world", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path, help="folder of the world; what is there of the same world is kept")
    add("--scale", choices=SCALES, default="full", help="smoke: some 300 clips, to try the code")
    add("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    add(
        "--face_bias", type=float, default=0.7, help="how often the cold start's writer trusts the face over the voice"
    )
    add("--voice", choices=VOICES, default=installed_voice(), help="default: espeak where espeak-ng is installed")
    add("--workers", type=int, default=os.cpu_count(), help="clips made at a time (default: %(default)s)")
    options = parser.parse_args(argv)

    def program() -> None:
        make_world(options.output, options.scale, options.seed, options.face_bias, options.voice, options.workers)
        print(f"wrote {options.output}. {NOTE}", file=sys.stderr)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
