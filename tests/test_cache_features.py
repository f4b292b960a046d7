"""The feature cache: training from it equals training from clips, and whatever does not fit it is refused by name."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import open_r1.cache_features as caching
from humanomni.errors import MediaError
from humanomni.modeling import HumanOmniQwen2ForCausalLM
from humanomni.processing import HumanOmniProcessor
from open_r1.cache_features import CacheError, FeatureCache, View, cache_features
from open_r1.data import Sample, SampleEncoder, SupervisedCollator, prepare_samples

EXAMPLE = Path(__file__).resolve().parent.parent / "assets" / "example.mp4"
ANSWER = {"from": "gpt", "value": "<think>She smiles.</think>\n<answer>happy</answer>"}


def sample(tags: str, **fields) -> dict:
    return {"conversations": [{"from": "human", "value": f"{tags}Which emotion?"}, ANSWER], **fields}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A data folder: four videos, a wave file, an image, a folder of frames and a file that is no clip."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "b", "c", "d"):
        shutil.copyfile(EXAMPLE, folder / f"{name}.mp4")
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(32000) / 9) * 9000).astype("<i2").tobytes())
    pixels = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), np.uint8)
    Image.fromarray(pixels[0]).save(folder / "face.png")
    (folder / "frames").mkdir()
    for index, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / "frames" / f"{index}.png")
    (folder / "broken.mp4").write_bytes(b"not a clip" * 100)
    return folder


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    """One sample for each way to show a clip; five of them show what another one shows too."""
    return [
        sample("<video>\n<audio>\n", video="a.mp4"),
        sample("<video>\n<audio>\n", video="a.mp4"),
        sample("<video>\n", video="a.mp4"),
        sample("<audio>\n", video="a.mp4"),
        sample("<video>\n<audio>\n", video="a.mp4", audio="tone.wav"),
        sample("<audio>\n", audio="tone.wav"),
        sample("<video>\n<audio>\n", video="b.mp4", start=0.5, end=1.5),
        sample("<image>\n", image="face.png"),
        sample("<video>\n", video="frames"),
        sample(""),
    ]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint) -> HumanOmniProcessor:
    return HumanOmniProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> HumanOmniQwen2ForCausalLM:
    return HumanOmniQwen2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def make(samples: list[dict], processor, folder: Path, clips: Path, **options) -> caching.CacheReport:
    parsed = [Sample.parse(fields, f"list, sample {index}") for index, fields in enumerate(samples)]
    return cache_features(parsed, processor, folder, data_folder=clips, device="cpu", **options)


@pytest.fixture(scope="module")
def made(samples, processor, clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make(samples, processor, folder, clips, shard_size=2, batch_size=3)
    return folder


@pytest.fixture
def cache(made, processor, clips, tmp_path) -> FeatureCache:
    """A cache whose folder and clips the test may change."""
    shutil.copytree(made, tmp_path / "cache")
    shutil.copytree(clips, tmp_path / "clips", copy_function=shutil.copy2)
    return FeatureCache(tmp_path / "cache", processor, tmp_path / "clips")


def changed_manifest(folder: Path, **changes) -> None:
    file = folder / caching.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_training(raw_model, model, raw: dict, cached: dict) -> None:
    """Same loss and gradients, as far as features rounded to 16 bits allow."""
    for one in (raw_model, model):
        one.zero_grad()
    expected, loss = raw_model(**raw).loss, model(**cached).loss
    assert loss.item() == pytest.approx(expected.item(), abs=2e-3)
    expected.backward()
    loss.backward()
    wanted = {name: weight.grad for name, weight in raw_model.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.linalg.norm(found[name] - gradient) <= 0.02 * torch.linalg.norm(gradient) + 1e-4, name


# ------------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("dtype", caching.STORED_DTYPES)
def test_features_are_those_of_the_model_rounded(dtype, samples, processor, model, clips, tmp_path):
    make(samples, processor, tmp_path, clips, dtype=dtype)
    cache = FeatureCache(tmp_path, processor, clips)
    raw = SupervisedCollator(processor, data_folder=clips)(samples)
    cached = SupervisedCollator(processor, data_folder=clips, feature_cache=cache)(samples)
    with torch.no_grad():
        encoded = model.model.encode(
            **{name: raw[name] for name in ("pixel_values_videos", "pixel_values", "input_features")}
        )
    assert encoded.keys() == {name for name in cached if name.endswith("_features")}
    assert [len(encoded[name]) for name in encoded] == [6, 1, 6]  # videos, images, sounds of the ten samples
    for name, features in encoded.items():
        assert cached[name].dtype == getattr(torch, dtype)
        precision = torch.finfo(cached[name].dtype).eps
        torch.testing.assert_close(cached[name].float(), features, rtol=precision, atol=1e-5)


def test_training_from_the_cache_equals_training_from_clips_without_towers(
    samples, processor, model, made, clips, tiny_checkpoint
):
    towerless = HumanOmniQwen2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, load_towers=False)
    assert towerless.model.vision_tower is None and towerless.model.audio_tower is None
    raw = SupervisedCollator(processor, data_folder=clips)(samples)
    cached = SupervisedCollator(processor, data_folder=clips, feature_cache=FeatureCache(made, processor, clips))(
        samples
    )
    assert not {"pixel_values_videos", "pixel_values", "input_features"} & cached.keys()
    assert_same_training(model, towerless, raw, cached)


@pytest.mark.parametrize("prompt_style", ["inference", "release"])
def test_golden_samples_train_alike_from_cache_and_clips(prompt_style, golden, tmp_path):
    conversations = json.loads((golden / "golden" / "sft.json").read_text())["conversations"]
    places = {"bert_model": golden / "bert-tiny"}
    processor = HumanOmniProcessor.from_pretrained(golden / "humanomni-tiny", **places)
    make(conversations, processor, tmp_path, golden / "media", prompt_style=prompt_style)
    cache = FeatureCache(tmp_path, processor, golden / "media")
    model, towerless = (
        HumanOmniQwen2ForCausalLM.from_pretrained(
            golden / "humanomni-tiny", dtype=torch.float32, load_towers=load, **places
        )
        for load in (True, False)
    )
    raw, cached = (
        SupervisedCollator(processor, prompt_style, golden / "media", feature_cache=source)(conversations)
        for source in (None, cache)
    )
    assert_same_training(model, towerless, raw, cached)


def test_each_clip_is_encoded_once_and_kept_in_whole_shards(made, processor, clips, samples):
    index = caching.read_index(made, json.loads((made / caching.MANIFEST).read_text()))
    views = {
        View("video", "a.mp4"), View("audio", "a.mp4"), View("audio", "tone.wav"), View("image", "face.png"),
        View("video", "b.mp4", 0.5, 1.5), View("audio", "b.mp4", 0.5, 1.5), View("video", "frames"),
    }  # fmt: skip
    assert index.keys() == views
    assert all(len(entries) == 1 for entries in index.values())
    assert len(list(made.glob("*.safetensors"))) == 3  # five clips, two a shard
    assert not list(made.glob(".*"))
    report = make(samples, processor, made, clips)
    assert (report.clips, report.present, report.encoded, report.bytes) == (5, 5, 0, 0)


def test_the_report_tells_hours_bytes_and_clips(samples, processor, clips, tmp_path):
    report = make(samples, processor, tmp_path, clips)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert report.bytes == written > 0
    assert report.encoded == 5
    whole = caching._seconds(clips / "a.mp4", View("video", "a.mp4"))
    assert report.seconds == pytest.approx(whole + 2.0 + 1.0, abs=0.1)  # a.mp4, tone.wav, one second of b.mp4
    assert "5 clips: 5 encoded (0.00 hours)" in str(report)


def test_workers_of_a_data_loader_read_the_cache(samples, processor, made, clips):
    collator = SupervisedCollator(processor, feature_cache=FeatureCache(made, processor, clips), data_folder=clips)
    expected = [collator(samples[start : start + 5]) for start in (0, 5)]
    sent = pickle.loads(pickle.dumps(collator))  # as spawned workers receive it
    loader = DataLoader(samples, batch_size=5, collate_fn=sent, num_workers=2, multiprocessing_context="fork")
    for batch, wanted in zip(loader, expected, strict=True):
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_blanks_stand_beside_features(cache):
    real, blank = (
        method(*arguments, "video_audio")
        for method, arguments in ((cache.get, [Sample(("q", "a"), video="a.mp4")]), (cache.blank, []))
    )
    stacked = cache.stack([real, blank])
    assert stacked["video_features"].shape[0] == stacked["audio_features"].shape[0] == 2
    assert not stacked["video_features"][1].any() and stacked["video_features"][0].any()
    image = cache.stack([cache.get(Sample(("q", "a"), image="face.png"), "image"), cache.blank("image")])
    assert image["image_features"].shape[:2] == (2, 1)
    assert cache.stack([cache.blank("text")]) == {}


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_frames", 16), ("image_aspect_ratio", "square"), ("mm_vision_select_layer", -1), ("format", 0)],
)
def test_a_foreign_setting_is_refused_with_both_values(name, value, cache, processor):
    ours = json.loads((cache.folder / caching.MANIFEST).read_text())[name]
    changed_manifest(cache.folder, **{name: value})
    with pytest.raises(CacheError, match=rf"with {name} {value!r}, not {ours!r}"):
        FeatureCache(cache.folder, processor)


@pytest.mark.parametrize("tower", caching.TOWER_FIELDS)
def test_a_tower_with_other_weights_is_refused_by_name(tower, cache, tiny_checkpoint, tmp_path):
    """Only the last value of one tensor in the middle of the file differs, by its first bit that counts."""
    other = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, other)
    processor = HumanOmniProcessor.from_pretrained(other)
    FeatureCache(cache.folder, processor)  # the same weights in another place are the same tower
    file = Path(getattr(processor.config, tower)) / "model.safetensors"
    assert other in file.parents
    weights = load_file(file)
    name = sorted(name for name in weights if name.endswith("fc1.weight"))[0]
    weights[name][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CacheError, match=rf"another {tower}: .*weights \w+\), not {file.parent} \(weights"):
        FeatureCache(cache.folder, processor)


def test_a_tower_of_another_make_is_refused(cache, tmp_path, processor):
    folder = tmp_path / "tower"
    shutil.copytree(processor.config.mm_vision_tower, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    other = HumanOmniProcessor.from_pretrained(processor.config._name_or_path, vision_tower=str(folder))
    with pytest.raises(CacheError, match=r"another mm_vision_tower: .*\(config"):
        FeatureCache(cache.folder, other)
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    FeatureCache(cache.folder, HumanOmniProcessor.from_pretrained(other.config._name_or_path, vision_tower=folder))


def test_weights_that_were_deleted_are_not_compared(cache, tmp_path, processor, tiny_checkpoint, caplog):
    folder = tmp_path / "tower"
    shutil.copytree(processor.config.mm_audio_tower, folder)
    (folder / "model.safetensors").unlink()
    towerless = HumanOmniProcessor.from_pretrained(tiny_checkpoint, audio_tower=str(folder))
    FeatureCache(cache.folder, towerless)
    assert "holds no weights" in caplog.text
    with pytest.raises(CacheError, match="holds no weights"):
        make([sample("<audio>\n", audio="tone.wav")], towerless, tmp_path / "new", tmp_path / "clips")


def test_pickled_weights_have_a_fingerprint(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, value in zip(folders, (1.0, 1.0, 2.0), strict=True):
        folder.mkdir()
        torch.save({"w": torch.full((1000,), value)}, folder / "pytorch_model.bin")
    first, same, other = (caching.fingerprint(folder)["weights"] for folder in folders)
    assert first == same != other


def test_a_clip_that_changed_is_stale(cache):
    path = cache.data_folder / "a.mp4"
    shown = Sample(("q", "a"), video="a.mp4", origin="list.json, sample 7")
    cache.get(shown, "video")
    os.utime(path, ns=(0, 0))
    with pytest.raises(CacheError, match=r"list.json, sample 7: the video features of a.mp4 are stale .*changed from"):
        cache.get(shown, "video")
    Image.new("RGB", (60, 40)).save(cache.data_folder / "frames" / "4.png")
    with pytest.raises(CacheError, match="frames are stale"):
        cache.get(Sample(("q", "a"), video="frames"), "video")


def test_a_changed_clip_is_encoded_again(cache, processor):
    os.utime(cache.data_folder / "a.mp4", ns=(0, 0))
    report = make([sample("<video>\n<audio>\n", video="a.mp4")], processor, cache.folder, cache.data_folder)
    assert (report.encoded, report.present) == (1, 0)
    FeatureCache(cache.folder, processor, cache.data_folder).get(Sample(("q", "a"), video="a.mp4"), "video_audio")


def test_a_clip_that_is_not_cached_names_the_command(cache):
    with pytest.raises(
        CacheError, match=r"audio features of d.mp4 .*not in .*python -m open_r1.cache_features --model"
    ):
        cache.get(Sample(("q", "a"), video="d.mp4"), "audio")
    with pytest.raises(CacheError, match=r"b.mp4 \(start=0.5, end=1.0\) are not in"):
        cache.get(Sample(("q", "a"), video="b.mp4", start=0.5, end=1.0), "video")


def test_samples_that_the_cache_lacks_stop_a_run_before_it_trains(cache, clips, processor):
    uncached = Sample.parse(sample("<video>\n", video="b.mp4", start=0.5, end=1.0))
    encode = SampleEncoder(processor)
    with pytest.raises(CacheError, match="are not in the feature cache"):
        prepare_samples([uncached], encode, data_folder=clips, feature_cache=cache)


def test_raw_clips_may_be_deleted(cache, samples, processor):
    collator = SupervisedCollator(processor, feature_cache=cache, data_folder=cache.data_folder)
    before = collator(samples)
    shutil.rmtree(cache.data_folder)
    after = collator(samples)
    assert all(torch.equal(after[name], before[name]) for name in before)
    report = make(samples, processor, cache.folder, cache.data_folder)
    assert report.present == report.clips


def test_foreign_and_damaged_files_are_named(cache, processor, tmp_path):
    with pytest.raises(CacheError, match=r"is no feature cache: it holds no manifest.json"):
        FeatureCache(tmp_path / "nowhere", processor)
    shard = next(cache.folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
        FeatureCache(cache.folder, processor)
    save_file({"x": torch.zeros(1)}, shard, {"entries": "{}", "manifest": "other"})
    with pytest.raises(CacheError, match=f"{shard.name} comes from another cache"):
        FeatureCache(cache.folder, processor)
    shard.unlink()
    (cache.folder / caching.MANIFEST).write_text("{")
    with pytest.raises(CacheError, match=r"manifest.json does not read"):
        FeatureCache(cache.folder, processor)


def test_a_shard_that_vanishes_is_named(cache):
    shutil.move(cache.folder, cache.folder.with_name("moved"))
    with pytest.raises(CacheError, match="does not read any more"):
        cache.get(Sample(("q", "a"), video="a.mp4"), "video")


def test_a_cache_is_not_mixed(cache, processor, samples):
    with pytest.raises(CacheError, match="with dtype 'float16', not 'bfloat16'"):
        make(samples, processor, cache.folder, cache.data_folder, dtype="bfloat16")


def test_features_too_large_for_float16_are_refused(clips, tiny_checkpoint, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, other)
    file = other / "vision_tower" / "model.safetensors"
    weights = {name: value * 1e6 if "position_embedding" in name else value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    processor = HumanOmniProcessor.from_pretrained(other)
    shown = [sample("<image>\n", image="face.png")]
    with pytest.raises(
        CacheError, match=r"image features of face.png are not finite in float16; pass --dtype bfloat16"
    ):
        make(shown, processor, tmp_path / "half", clips)
    assert make(shown, processor, tmp_path / "brain", clips, dtype="bfloat16").encoded == 1


# --------------------------------------------------------------------------------------------------------- bad clips


def test_a_bad_clip_stops_or_is_noted(processor, clips, tmp_path):
    shown = [sample("<video>\n<audio>\n", video=f"{name}.mp4") for name in ("a", "broken", "gone", "b", "c", "d")]
    with pytest.raises(MediaError, match=r"broken.mp4.*--on_bad_sample skip"):
        make(shown, processor, tmp_path, clips, batch_size=1)
    report = make(shown, processor, tmp_path, clips, on_bad_sample="skip")
    assert (report.present, report.encoded) == (1, 3)  # a.mp4 was kept when the first run stopped
    lines = [json.loads(line) for line in (tmp_path / caching.BAD_CLIPS).read_text().splitlines()]
    noted = [(line["view"]["path"], line["view"]["kind"]) for line in lines]
    assert sorted(noted) == [(name, kind) for name in ("broken.mp4", "gone.mp4") for kind in ("audio", "video")]

    cache = FeatureCache(tmp_path, processor, clips)
    with pytest.raises(MediaError, match=r"broken.mp4.*bad_clips.jsonl"):
        cache.get(Sample(("q", "a"), video="broken.mp4"), "video_audio")
    collator = SupervisedCollator(processor, data_folder=clips, feature_cache=cache, on_bad_sample="skip")
    batch = collator(shown)
    trained = (batch["labels"] != -100).any(dim=1)
    assert trained.tolist() == [True, False, False, True, True, True]
    assert len(batch["video_features"]) == len(batch["audio_features"]) == 6


def test_a_mended_clip_is_encoded_by_the_next_run(processor, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    shown = [sample("<video>\n", video="broken.mp4")]
    make(shown, processor, tmp_path / "cache", tmp_path / "clips", on_bad_sample="skip")
    shutil.copyfile(EXAMPLE, tmp_path / "clips" / "broken.mp4")
    cache = FeatureCache(tmp_path / "cache", processor, tmp_path / "clips")
    with pytest.raises(CacheError, match="not in the feature cache"):
        cache.get(Sample(("q", "a"), video="broken.mp4"), "video")
    report = make(shown, processor, tmp_path / "cache", tmp_path / "clips", on_bad_sample="skip")
    assert (report.encoded, report.bad) == (1, [])
    FeatureCache(tmp_path / "cache", processor, tmp_path / "clips").get(
        Sample(("q", "a"), video="broken.mp4"), "video"
    )


# -------------------------------------------------------------------------------------- several processes, restarts


def command(tiny_checkpoint: Path, listed: Path, out: Path, clips: Path, *options) -> list[str]:
    options = [*options, "--model_path", tiny_checkpoint, "--data", listed, "--out", out, "--data_folder", clips]
    return ["-m", "open_r1.cache_features", "--device", "cpu", *map(str, options)]


@pytest.fixture
def many(clips, tmp_path) -> tuple[Path, Path, list[dict]]:
    """A folder with thirty clips, the list of their samples, and the samples."""
    folder = tmp_path / "many"
    folder.mkdir()
    shown = []
    for index in range(30):
        shutil.copyfile(EXAMPLE, folder / f"{index}.mp4")
        shown.append(sample("<video>\n<audio>\n", video=f"{index}.mp4"))
    (tmp_path / "list.json").write_text(json.dumps(shown))
    return folder, tmp_path / "list.json", shown


def test_the_parts_of_several_processes_make_one_cache(samples, processor, clips, tmp_path):
    reports = [make(samples, processor, tmp_path, clips, rank=rank, world_size=3) for rank in (2, 0, 1)]
    assert sorted(report.encoded for report in reports) == [1, 2, 2]
    cache = FeatureCache(tmp_path, processor, clips)
    assert all(len(entries) == 1 for entries in cache.index.values())
    SupervisedCollator(processor, data_folder=clips, feature_cache=cache)(samples)


def test_the_command_line_reports_and_refuses(tiny_checkpoint, samples, clips, tmp_path, capsys):
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(json.dumps(fields) for fields in samples))
    arguments = command(tiny_checkpoint, listed, tmp_path / "out", clips)[2:]
    assert caching.main(arguments) == 0
    assert capsys.readouterr().out.startswith("5 clips: 5 encoded")
    assert caching.main([*arguments, "--dtype", "bfloat16"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: feature cache") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.slow
def test_a_killed_run_loses_one_shard_at_most(many, tiny_checkpoint, processor, tmp_path):
    clips, listed, shown = many
    out = tmp_path / "cache"
    arguments = command(tiny_checkpoint, listed, out, clips, "--shard_size", 2, "--batch_size", 1, "--num_workers", 1)
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("features-*"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = 2 * len(list(out.glob("features-*")))
    assert saved < len(shown), "the run was over before it was killed"
    report = make(shown, processor, out, clips)
    assert (report.present, report.encoded) == (saved, len(shown) - saved)
    SupervisedCollator(processor, data_folder=clips, feature_cache=FeatureCache(out, processor, clips))(shown)


@pytest.mark.slow
def test_torchrun_shares_the_work(many, tiny_checkpoint, processor, tmp_path):
    clips, listed, shown = many
    out = tmp_path / "cache"
    arguments = command(tiny_checkpoint, listed, out, clips)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"process {rank} of 2: 15 clips: 15 encoded" in done.stdout
    cache = FeatureCache(out, processor, clips)
    assert all(len(entries) == 1 for entries in cache.index.values())
    assert len(cache.index) == 60
    assert all(cache.find(Sample.parse(fields), "video_audio") for fields in shown)


def test_an_abandoned_draft_is_swept_and_a_fresh_one_left(cache, processor, samples):
    old, fresh = (cache.folder / f".features-{name}.safetensors" for name in ("old", "fresh"))
    for draft in (old, fresh):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    make(samples, processor, cache.folder, cache.data_folder)
    assert not old.exists() and fresh.exists()
    assert pickle.loads(pickle.dumps(FeatureCache(cache.folder, processor))).index == cache.index
