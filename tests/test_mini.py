"""The miniature's world: its clips show and sound what their cues say, and its lists follow from the seed alone."""

import re
from pathlib import Path

import av
import numpy as np
import pytest

from humanomni import load_pretrained
from humanomni.generation import generate
from humanomni.media import read_frames, read_waveform
from open_r1.data import read_samples
from open_r1.labels import CLASSES, canonical
from open_r1.metrics import is_well_formed, parse_answer
from open_r1.mini import world
from open_r1.mini.cues import KINDS, PROTOTYPES, TYPICAL, Scene, best_answer, draw_scene
from open_r1.mini.face import draw_face
from open_r1.mini.results import cues_right, spread
from open_r1.mini.texts import description, explained_answer, reasoning
from open_r1.mini.voice import RATE, installed_voice, make_voice

ROOT = Path(__file__).resolve().parents[1]
HAPPY = Scene("happy", "agree", "happy", "happy", *PROTOTYPES["happy"])
MEDIUM = (1, 1, 1, 1, 0)
VOICES = [
    "vowels",
    pytest.param("espeak", marks=pytest.mark.skipif(installed_voice() != "espeak", reason="no espeak-ng")),
]


def scenes(name: str, count: int, seed: int = 0) -> list[Scene]:
    random = np.random.default_rng(seed)
    return [draw_scene(world.SPLITS[name].population, random) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- truth


def test_the_three_sets_have_the_classes_of_the_sets_they_are_named_after():
    for name in ("dfew", "mafw", "ravdess"):
        assert set(world.SPLITS[f"{name}_test"].population.emotions) == set(CLASSES[name])


def test_emotions_differ_in_both_modalities():
    for modality in (0, 1):
        codes = [prototype[modality] for prototype in PROTOTYPES.values()]
        assert (
            min(
                sum(a != b for a, b in zip(one, other, strict=True))
                for i, one in enumerate(codes)
                for other in codes[:i]
            )
            >= 2
        )


def test_kinds_of_clips_and_which_modality_decides():
    drawn = scenes("mafw_test", 3000)
    for scene in drawn:
        expected = {
            "agree": (scene.label, scene.label),
            "picture": (scene.label, "neutral"),
            "sound": ("neutral", scene.label),
            "conflict": (scene.picture_emotion, scene.label),  # the sound decides
        }[scene.kind]
        assert (scene.picture_emotion, scene.sound_emotion) == expected
        if scene.kind == "conflict":
            assert scene.picture_emotion not in (scene.label, "neutral")
    assert {scene.kind for scene in drawn} == set(KINDS)
    typical = np.mean([np.mean(np.equal(s.sound, PROTOTYPES[s.sound_emotion][1])) for s in drawn])
    assert typical == pytest.approx(TYPICAL, abs=0.02)


@pytest.mark.parametrize("name", ["dfew_test", "mafw_test", "ravdess_test"])
def test_no_other_rule_beats_the_best_answer(name):
    drawn, population = scenes(name, 3000), world.SPLITS[name].population

    def nearest(levels, modality):
        return min(
            population.emotions,
            key=lambda e: sum(a != b for a, b in zip(levels, PROTOTYPES[e][modality], strict=True)),
        )

    def sound_unless_neutral(scene):
        heard = nearest(scene.sound, 1)
        return nearest(scene.picture, 0) if heard == "neutral" else heard

    def accuracy(rule):
        return np.mean([rule(scene) == scene.label for scene in drawn])

    best = accuracy(lambda scene: best_answer(scene, population))
    assert 0.8 < best < 0.97
    assert best > accuracy(sound_unless_neutral)
    assert best > accuracy(lambda scene: nearest(scene.picture, 0)) + 0.1
    assert best > accuracy(lambda scene: nearest(scene.sound, 1)) + 0.1


# ------------------------------------------------------------------------------------------------------------- lists


def test_the_same_seed_gives_the_same_lists_and_another_one_others(tmp_path):
    def lists(folder, seed):
        drawn = {name: world.draw_scenes(name, "smoke", seed) for name in world.SPLITS}
        folder.mkdir()
        world.write_lists(folder, drawn, seed, face_bias=0.7)
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    first, again, other = lists(tmp_path / "a", 3), lists(tmp_path / "b", 3), lists(tmp_path / "c", 4)
    assert first == again
    assert first["base.json"] != other["base.json"]
    for name in first:
        assert read_samples(tmp_path / "a" / name)


def test_the_full_world_has_the_paper_s_580_explained_samples():
    drawn = world.draw_scenes("cold_start", "full", 0)
    samples = world.cold_start_list(drawn, 0, face_bias=0.7)
    assert len(samples) == 580
    answers = [sample["conversations"][1]["value"] for sample in samples]
    assert all(map(is_well_formed, answers))
    for scene, answer in zip(drawn, answers, strict=True):
        assert canonical(parse_answer(answer), PROTOTYPES) is not None
        assert cues_right(answer, scene) == 10


def test_the_writer_s_bias_is_a_setting():
    drawn = [scene for scene in scenes("cold_start", 2000) if scene.kind == "conflict"]
    for bias in (0.0, 0.7, 1.0):
        random = np.random.default_rng(0)
        answers = [parse_answer(explained_answer(scene, bias, False, random)) for scene in drawn]
        trusts_face = np.mean([answer == scene.picture_emotion for answer, scene in zip(answers, drawn, strict=True)])
        assert trusts_face == pytest.approx(bias, abs=0.06)


def test_single_modalities_are_asked_about_and_described():
    samples = world.base_list(world.draw_scenes("base", "full", 0)[:500], 0)
    shown = [sample["conversations"][0]["value"].split("\n")[:2] for sample in samples]
    assert {tuple(part for part in parts if part.startswith("<")) for parts in shown} == {
        ("<video>", "<audio>"), ("<video>",), ("<audio>",),
    }  # fmt: skip
    assert "audio" not in description(HAPPY, "video") and "video" not in description(HAPPY, "audio")


def test_cues_named_in_a_reasoning_are_counted_in_their_place():
    right = reasoning(HAPPY, "happy", "happy", "happy")
    assert cues_right(right, HAPPY) == 10
    assert cues_right(right.replace("smiling", "frowning").replace("loud", "soft"), HAPPY) == 8
    assert cues_right("<answer>happy</answer>", HAPPY) == 0
    assert cues_right(description(HAPPY, "audio"), HAPPY) == 5


def test_spread():
    assert (spread([]), spread([50.0]), spread([1.0, 3.0])) == ("", "50.0", "2.0 ± 1.4")


# ------------------------------------------------------------------------------------------------------------- clips


def face(levels, seed=0):
    return draw_face(levels, world.FACES["in"], world.SECONDS, np.random.default_rng(seed)).astype(float)


def middle(frames):
    """Where the frames differ from their corner's colour: (x, y) of each frame."""
    mask = np.abs(frames - frames[:, :1, :1]).sum(-1) > 60
    ys, xs = np.mgrid[: frames.shape[1], : frames.shape[2]]
    return np.stack([(mask * xs).sum((1, 2)), (mask * ys).sum((1, 2))], 1) / mask.sum((1, 2))[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_a_nodding_head_moves_up_and_down_and_a_shaking_one_sideways(seed):
    moves = [middle(face((1, 1, 1, 1, head), seed)).std(0) for head in range(3)]
    assert moves[0].max() < 0.5
    assert moves[1][1] > 3 * moves[1][0] and moves[1][1] > 0.8
    assert moves[2][0] > 3 * moves[2][1] and moves[2][0] > 0.8


@pytest.mark.parametrize("cue", range(4))
def test_each_feature_of_the_face_shows(cue):
    shown = [face((*(1,) * cue, level, *(1,) * (4 - cue)))[0] for level in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (np.abs(shown[one] - shown[other]).sum(-1) > 60).sum() > 4


def voice(levels, kind, seed=0):
    return make_voice(levels, world.VOICE_STYLES["in"], world.SECONDS, np.random.default_rng(seed), kind)


def pitch(sound):
    """Median fundamental frequency in Hz, by autocorrelation."""
    found = []
    for start in range(0, len(sound) - 1024, 512):
        part = sound[start : start + 1024] - sound[start : start + 1024].mean()
        correlation = np.correlate(part, part, "full")[1023:]
        low, high = RATE // 450, RATE // 70
        lag = low + correlation[low:high].argmax()
        if correlation[lag] > 0.5 * correlation[0] > 1e-3:
            found.append(RATE / lag)
    return np.median(found)


@pytest.mark.parametrize("kind", VOICES)
@pytest.mark.parametrize("seed", range(3))
def test_pitch_contour_and_loudness_sound(kind, seed):
    low, medium, high = (pitch(voice((level, *MEDIUM[1:]), kind, seed)) for level in range(3))
    assert low < 0.85 * medium < 0.75 * high
    for level, sign in ((0, -1), (2, 1)):
        sound = voice((1, level, *MEDIUM[2:]), kind, seed)
        assert sign * np.log2(pitch(sound[-RATE // 2 :]) / pitch(sound[: RATE // 2])) > 0.15
    soft, moderate, loud = (np.std(voice((1, 1, level, 1, 0), kind, seed)) for level in range(3))
    assert soft < 0.6 * moderate < 0.4 * loud


def test_a_clip_is_h264_and_aac_and_decord_reads_it(tmp_path):
    (tmp_path / "clips" / "base").mkdir(parents=True)
    scene = world.draw_scenes("base", "smoke", 0)[0]
    world.write_clip(tmp_path, 0, "vowels", scene)
    path = tmp_path / world.clip_name(scene)
    with av.open(path) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert len(read_frames(path, 4)) == 4
    sound = read_waveform(path, sampling_rate=RATE)
    assert len(sound) / RATE == pytest.approx(world.SECONDS, abs=0.15) and sound.std() > 1e-3


def test_what_is_there_is_kept_and_another_world_is_refused(tmp_path, monkeypatch, capsys):
    few = {name: world.Split(split.population, split.style, 2, 2) for name, split in world.SPLITS.items()}
    monkeypatch.setattr(world, "SPLITS", few)
    arguments = [str(tmp_path / "w"), "--scale", "smoke", "--voice", "vowels", "--workers", "1"]
    assert world.main(arguments) == 0
    clips = sorted((tmp_path / "w").rglob("*.mp4"))
    assert len(clips) == 2 * len(few)
    clips[0].unlink()
    times = {clip: clip.stat().st_mtime_ns for clip in clips[1:]}
    assert world.main(arguments) == 0
    assert clips[0].exists() and times == {clip: clip.stat().st_mtime_ns for clip in clips[1:]}
    assert world.main([*arguments, "--seed", "1"]) == 2
    assert "holds another world" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the wall


def test_nothing_outside_of_it_knows_the_miniature():
    files = [*(ROOT / "humanomni").rglob("*.py"), *(ROOT / "src").rglob("*.py"), ROOT / "inference.py"]
    outside = [file for file in files if "mini" not in file.relative_to(ROOT).parts[:-1]]
    assert len(outside) > 30
    for file in outside:
        assert not re.search(r"\bmini\b|mini_", file.read_text("utf-8")), file


# ------------------------------------------------------------------------------------------------- the bundled model


def test_the_bundled_model_reasons_and_answers_right_about_its_clips():
    folder = ROOT / "assets" / "mini" / "R1-Omni-mini"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 12e6
    samples = read_samples(folder.parent / "clips.json")
    assert len(samples) == 5
    model, processor = load_pretrained(folder, device="cpu", dtype="float32")
    for sample in samples:
        text = generate(model, processor, video=str(folder.parent / sample.clip), max_new_tokens=96)
        assert is_well_formed(text), text
        assert parse_answer(text) == sample.answer
        assert text.startswith("<think>In the video, a ") and "In the audio, a " in text


def test_quickstart_asks_the_bundled_model_about_a_bundled_clip():
    script = (ROOT / "scripts" / "quickstart.sh").read_text("utf-8")
    for path in re.findall(r"assets/mini/[\w./-]+", script):
        assert (ROOT / path.rstrip(".")).exists(), path
    assert "no judge of people's feelings" in script
