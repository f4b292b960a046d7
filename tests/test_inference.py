"""`inference.py` as a user runs it: what it prints where, its exit status, resuming, and a line for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import humanomni
import inference
from humanomni import loading, processing, prompts
from humanomni.generation import generate

REPOSITORY = Path(__file__).resolve().parent.parent
CLIP = REPOSITORY / "assets" / "example.mp4"
SHORT = ("--max_new_tokens", "12")


@pytest.fixture(autouse=True)
def quiet_libraries_stay_local():
    """The program silences transformers; other tests want to hear it."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    yield
    log.set_verbosity(verbosity)
    log.enable_progress_bar()


class Outcome:
    """Exit status, stdout, and the lines on stderr apart from the progress bar's."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err
        lines = err.replace("\r", "\n").split("\n")
        self.lines = [line for line in lines if line.strip() and "clip/s]" not in line and "s/clip]" not in line]

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]

    def check_mistake(self, *named) -> None:
        """One line on stderr that names the things, nothing on stdout, and a status that tells of failure."""
        assert self.status in (1, 2)
        assert self.out == ""
        assert len(self.lines) == 1, self.err
        assert self.lines[0].startswith("inference.py: error: ")
        assert "Traceback" not in self.err
        for name in named:
            assert str(name) in self.lines[0]


@pytest.fixture
def run(capsys, tiny_checkpoint):
    """Runs the program in this process on the tiny checkpoint, or on the `model` given."""

    def run(*arguments, model=None) -> Outcome:
        capsys.readouterr()
        argv = ["--model_path", model or tiny_checkpoint, *SHORT, *arguments]
        try:
            status = inference.main([str(argument) for argument in argv])
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capsys.readouterr())

    return run


def start(*arguments, **options) -> subprocess.Popen:
    """Starts the program as a process of its own."""
    command = [sys.executable, REPOSITORY / "inference.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def ffmpeg(*arguments) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder of odd, broken and empty clips."""
    folder = tmp_path_factory.mktemp("media")
    whole = CLIP.read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is no video.\n" * 50)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    ffmpeg("-i", CLIP, "-c", "copy", "-movflags", "+faststart", folder / "index_first.mp4")
    whole = (folder / "index_first.mp4").read_bytes()
    (folder / "index_first.mp4").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    for place in range(whole.index(b"mdat") + 100, len(whole), 97):
        flipped[place] ^= 0xFF
    (folder / "flipped.mp4").write_bytes(flipped)
    flipped = bytearray(whole)
    for place in range(8, whole.index(b"mdat"), 31):
        flipped[place] ^= 0x5A
    (folder / "flipped_index.mp4").write_bytes(flipped)
    (folder / "no_frames").mkdir()
    (folder / "no_frames" / "notes.txt").write_text("none")
    picture = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=10:duration=2")
    ffmpeg(*picture, "-frames:v", "0", "-c:v", "libx264", folder / "no_frame.mp4")
    ffmpeg(*picture, "-frames:v", "1", folder / "one_frame.mp4")
    ffmpeg(*picture, "-frames:v", "3", folder / "silent.mp4")
    surround = "sine=frequency=440:duration=2:sample_rate=48000,pan=5.1|FL=c0|FR=c0|FC=c0|LFE=c0|BL=c0|BR=c0"
    ffmpeg(*picture, "-f", "lavfi", "-i", surround, "-c:a", "aac", folder / "surround_48k.mp4")
    (folder / "frames").mkdir()
    ffmpeg(*picture, "-frames:v", "3", folder / "frames" / "%02d.png")
    return folder


def copy_checkpoint(source: Path, folder: Path, **config) -> Path:
    """A copy of a checkpoint, its config.json changed."""
    shutil.copytree(source, folder)
    edit_config(folder, **config)
    return folder


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ----------------------------------------------------------------------------------------------------- what is printed


def test_one_clip_prints_the_text_and_nothing_else(run, tiny_checkpoint):
    model, processor = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    text = generate(model, processor, video=CLIP, max_new_tokens=12)
    assert len(text) > 10
    for extra in ((), ("--stream",)):
        outcome = run("--video_path", CLIP, *extra)
        assert (outcome.status, outcome.out, outcome.err) == (0, text + "\n", "")


def test_options_reach_the_model(run, tiny_checkpoint):
    model, processor = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    question = "What is it?"
    for flags, options in {
        ("--modal", "audio"): {"modal": "audio"},
        ("--modal", "video", "--num_frames", "3"): {"modal": "video", "num_frames": 3},
        ("--start", "1", "--end", "2.5"): {"start": 1.0, "end": 2.5},
        ("--prompt_style", "release_grpo"): {"prompt_style": "release_grpo"},
        ("--do_sample", "--temperature", "2", "--top_p", "0.9", "--seed", "7"): {
            "do_sample": True, "temperature": 2.0, "top_p": 0.9, "seed": 7,
        },
    }.items():  # fmt: skip
        text = generate(model, processor, question, CLIP, max_new_tokens=12, **options)
        assert run("--video_path", CLIP, "--instruct", question, *flags).out == text + "\n"


def test_modals_image_and_text(run, media):
    image = run("--modal", "image", "--video_path", media / "frames" / "01.png")
    padded = run("--modal", "image", "--video_path", media / "frames" / "01.png", "--image_aspect_ratio", "pad")
    text = run("--modal", "text", "--instruct", "Hello?")
    assert image.status == text.status == 0
    assert image.out == padded.out != text.out  # the picture is square already
    assert image.err == text.err == ""


def test_a_seed_makes_sampling_repeatable(run):
    texts = [run("--video_path", CLIP, "--do_sample", "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_recorded_texts(run, golden):
    for clip, modal, text in (("m3_speech.mp4", "video_audio", "de"), ("m4_noaudio.mp4", "video", None)):
        for variant in ("humanomni-tiny", "humanomni-tiny-with-towers"):
            flags = ("--bert_model", golden / "bert-tiny", "--modal", modal, "--video_path", golden / "media" / clip)
            outcome = run(*flags, model=golden / variant)
            assert (outcome.status, outcome.err) == (0, "")
            assert text is None or outcome.out == text + "\n"


# ------------------------------------------------------------------------------------------------ which clips it takes


def test_several_files_give_a_line_each_in_order(run, media):
    outcome = run("--video_path", CLIP, media / "one_frame.mp4", media / "silent.mp4", CLIP, "--batch_size", 2)
    assert outcome.status == 0
    assert [Path(record["path"]).name for record in outcome.records] == ["example.mp4", "one_frame.mp4", "silent.mp4"]
    assert set(outcome.records[0]) == {"path", "modal", "instruct", "text", "think", "answer", "seconds", "settings"}
    assert outcome.records[0]["text"] == run("--video_path", CLIP).out.rstrip("\n")
    assert outcome.lines == [] and "3/3" in outcome.err


def test_folders_and_globs(run, media, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("b.mp4", "a.MP4", ".hidden.mp4"):
        shutil.copy(media / "one_frame.mp4", clips / name)
    (clips / "cover.png").write_bytes((media / "frames" / "01.png").read_bytes())
    (clips / "labels.csv").write_text("a,happy")
    folder = run("--video_path", clips)
    assert [record["path"] for record in folder.records] == [str(clips / "a.MP4"), str(clips / "b.mp4")]
    assert [record["path"] for record in run("--video_path", clips / "*.[mM]*4").records] == [
        str(clips / "a.MP4"), str(clips / "b.mp4")
    ]  # fmt: skip
    frames = run("--video_path", media / "frames", "--modal", "video")  # pictures alone are one clip
    assert frames.status == 0 and not frames.out.startswith("{")
    assert len(run("--video_path", media / "frames", "--modal", "image").records) == 3
    shutil.copytree(clips, tmp_path / "[1]")
    assert len(run("--video_path", tmp_path / "[1]").records) == 2  # a name that only looks like a glob
    run("--video_path", clips / "*.avi").check_mistake(clips / "*.avi")


def test_lists(run, media, tmp_path, monkeypatch):
    monkeypatch.chdir(media)
    shutil.copy(media / "one_frame.mp4", tmp_path / "beside.mp4")
    sample = {
        "video": "beside.mp4",
        "conversations": [{"from": "human", "value": "<video>\nHm?"}, {"from": "gpt", "value": "x"}],
    }
    entries = [
        sample,
        "silent.mp4",
        {"path": str(CLIP), "modal": "audio", "instruct": "Who speaks?", "start": 1, "end": 2.5},
        {"modal": "text", "instruct": "Hello?"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    outcomes = [run("--video_path", tmp_path / name, "--instruct", "Well?") for name in ("list.json", "list.jsonl")]
    for outcome in outcomes:
        assert outcome.status == 0
        first, second, third, fourth = outcome.records
        assert (first["path"], first["instruct"]) == (str(tmp_path / "beside.mp4"), "Well?")
        assert (second["path"], second["modal"]) == ("silent.mp4", "video_audio")
        assert [third[key] for key in ("modal", "instruct", "start", "end")] == ["audio", "Who speaks?", 1, 2.5]
        assert (fourth["path"], fourth["modal"]) == (None, "text")
    assert [r["text"] for r in outcomes[0].records] == [r["text"] for r in outcomes[1].records]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", "[{", ("a.json is not JSON",)),
        ("a.json", '{"video": "x"}', ("a.json", "dict")),
        ("a.json", "[]", ("a.json", "no clip")),
        ("a.json", '["a.mp4", 5]', ("entry 2 of", "5")),
        ("a.json", '[{"clip": "a.mp4"}]', ("entry 1 of", "'video' nor 'path'")),
        ("a.jsonl", '"a.mp4"\n\n{"path": 3}\n', ("line 3 of", "path", "3")),
        ("a.jsonl", '{"path": "a.mp4", "start": "1"}\n', ("start in line 1 of", "'1'")),
        ("a.jsonl", "a.mp4\n", ("line 1 of", "not JSON")),
        ("a.jsonl", '"nowhere.mp4"', ("nowhere.mp4 does not exist",)),
    ],
)
def test_lists_that_do_not_fit(name, content, named, run, tmp_path):
    (tmp_path / name).write_text(content)
    run("--video_path", tmp_path / name).check_mistake(*named)


def test_a_bad_clip_in_a_list_does_not_stop_the_rest(run, media, tmp_path):
    output = tmp_path / "results.jsonl"
    bad = media / "text.mp4"
    outcome = run("--video_path", media / "one_frame.mp4", bad, media / "gone.mp4", CLIP, "--output", output)
    assert (outcome.status, outcome.out) == (1, "")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, True, False]
    assert [str(bad) in line for line in outcome.lines] == [True, False, False]
    assert str(media / "gone.mp4") in outcome.lines[1]
    assert "2 of 4 clips failed" in outcome.lines[2]


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_cut_output_file_is_continued(run, media, tmp_path):
    output = tmp_path / "new folder" / "results.jsonl"
    arguments = ("--video_path", media / "one_frame.mp4", CLIP, media / "silent.mp4", "--batch_size", 1)
    run(*arguments, "--output", output)
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first + 1, first + 200, len(whole) - 1, first, 5, 0):
        output.write_bytes(whole[:length])
        outcome = run(*arguments, "--output", output)
        assert (outcome.status, outcome.out) == (0, "")
        done = whole[:length].count(b"\n")
        assert outcome.lines == ([f"{output}: {done} of 3 clips were done before"] if done else [])
        ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in (output.read_bytes(), whole))
        assert [{**record, "seconds": 0} for record in ours] == [{**record, "seconds": 0} for record in theirs]
    before = output.read_bytes()
    assert "3 of 3 clips were done before" in run(*arguments, "--output", output).err
    assert output.read_bytes() == before
    one_more = run(*arguments[:-2], media / "surround_48k.mp4", "--output", output)
    assert one_more.status == 0
    assert output.read_bytes().startswith(before) and output.read_bytes().count(b"\n") == 4


def test_failed_clips_are_tried_again_and_another_part_is_another_clip(run, media, tmp_path):
    output, late = tmp_path / "results.jsonl", tmp_path / "late.mp4"
    assert run("--video_path", late, CLIP, "--output", output).status == 1
    shutil.copy(media / "one_frame.mp4", late)
    assert run("--video_path", late, CLIP, "--output", output).status == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["path"], "text" in record) for record in records] == [(str(CLIP), True), (str(late), True)]
    for extra in (("--end", 2), ("--modal", "audio")):
        assert run("--video_path", CLIP, "--output", output, *extra).lines == []
    assert output.read_text().count("\n") == 4


def test_one_clip_with_an_output_file_is_also_printed(run, tmp_path):
    arguments = ("--video_path", CLIP, "--output", tmp_path / "results.jsonl")
    first, again = run(*arguments), run(*arguments)
    assert first.out == again.out == json.loads((tmp_path / "results.jsonl").read_text())["text"] + "\n"
    assert first.err == "" and "1 of 1 clips were done before" in again.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--instruct", "Who?"), "another question"),
        (("--max_new_tokens", "13"), "max_new_tokens 12, this run has 13"),
        (("--do_sample",), "do_sample None, this run has True"),
        (("--num_frames", "4"), "num_frames"),
        (("--seed", "0"), "seed None, this run has 0"),
    ],
)
def test_results_of_other_settings_are_not_mixed(flags, named, run, tmp_path):
    output = tmp_path / "results.jsonl"
    record = {
        "path": str(CLIP), "modal": "video_audio", "instruct": prompts.DEFAULT_INSTRUCT, "text": "a", "think": None,
        "answer": None, "seconds": 1, "settings": {"model": "m", "prompt_style": "inference", "max_new_tokens": 12},
    }  # fmt: skip
    output.write_text(json.dumps(record) + "\n")
    run("--video_path", CLIP, "--output", output, *flags, model="m").check_mistake(
        "line 1 of", output, named, "--output"
    )
    run("--video_path", CLIP, "--output", output, model="n").check_mistake("model 'm'", "'n'")
    assert output.read_text() == json.dumps(record) + "\n"


@pytest.mark.parametrize("content", ['["a.mp4"]', '["a.mp4"]\n', '{"path": "a.mp4"}\n', "name,label\n", "\x00\x01"])
def test_a_file_that_holds_something_else_is_left_alone(content, run, tmp_path):
    output = tmp_path / "mine.json"
    output.write_text(content)
    run("--video_path", CLIP, "--output", output).check_mistake(output, "--output")
    assert output.read_text() == content


def test_an_output_file_that_cannot_be_written(run, media, tmp_path):
    (tmp_path / "file").touch()
    run("--video_path", CLIP, "--output", tmp_path / "file" / "x.jsonl").check_mistake(tmp_path / "file" / "x.jsonl")
    run("--video_path", CLIP, "--output", tmp_path).check_mistake(tmp_path)
    if Path("/dev/full").exists():
        run("--video_path", CLIP, media / "silent.mp4", "--output", "/dev/full").check_mistake("/dev/full", "No space")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name", ["missing.mp4", "empty.mp4", "text.mp4", "cut.mp4", "index_first.mp4", "flipped.mp4", "flipped_index.mp4",
             "no_frames", "no_frame.mp4"]
)  # fmt: skip
def test_clips_that_do_not_read(name, run, media):
    run("--video_path", media / name).check_mistake(media / name)


@pytest.mark.parametrize("name", ["one_frame.mp4", "silent.mp4", "surround_48k.mp4"])
def test_odd_clips_that_read(name, run, media):
    outcome = run("--video_path", media / name)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.strip()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--modal", "smell"), ("--modal", "'smell'", "video_audio")),
        (("--prompt_style", "mine"), ("--prompt_style", "'mine'")),
        (("--image_aspect_ratio", "wide"), ("--image_aspect_ratio", "'wide'")),
        (("--dtype", "int8"), ("--dtype", "'int8'", "bfloat16")),
        (("--attn_implementation", "fast"), ("--attn_implementation", "'fast'")),
        (("--max_new_tokens", "0"), ("--max_new_tokens", "'0'")),
        (("--max_new_tokens", "99999"), ("99999", "32768", "--max_new_tokens")),
        (("--batch_size", "-1"), ("--batch_size", "'-1'")),
        (("--num_frames", "0"), ("--num_frames", "'0'")),
        (("--num_workers", "two"), ("--num_workers", "'two'")),
        (("--start", "-1"), ("--start", "'-1'")),
        (("--start", "3", "--end", "2"), (CLIP, "3", "2")),
        (("--start", "99"), (CLIP, "99")),
        (("--end", "nan"), ("--end", "'nan'")),
        (("--do_sample", "--temperature", "0"), ("--temperature", "'0'")),
        (("--do_sample", "--top_p", "1.5"), ("--top_p", "'1.5'")),
        (("--temperature", "0.5"), ("--temperature 0.5", "--do_sample")),
        (("--instruct", " "), ("instruction", "' '")),
        (("--instruct", "<video>\nWho?"), ("<video>", "Who?")),
        (("--device", "gpu"), ("'gpu'", "cuda")),
        (("--modal", "text"), ("--modal text", CLIP)),
        (("--modal", "image"), (CLIP,)),
        (("--modal", "image", "--start", "1"), ("--start 1", "image")),
        (("--videos", "x"), ("--videos",)),
    ],
)
def test_options_that_do_not_fit(flags, named, run):
    run("--video_path", CLIP, *flags).check_mistake(*named)


def test_no_clip_and_too_many(run, media):
    run().check_mistake("--video_path")
    run("--video_path", CLIP, media / "silent.mp4", "--stream").check_mistake("--stream", 2)
    run("--video_path", media / "x.mp4", media / "y.mp4").check_mistake(media / "x.mp4", "any of the 2")


def test_a_modal_without_its_medium(run, media, tmp_path):
    run("--modal", "audio", "--video_path", media / "frames").check_mistake(media / "frames")
    run("--modal", "video", "--video_path", media / "frames" / "01.png").check_mistake("01.png", "--modal image")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_and_absent(run):
    run("--video_path", CLIP, "--device", "cuda").check_mistake("'cuda'", "--device cpu")


def test_out_of_memory_names_the_options(run):
    def refuse(module, _):  # the allocator's own error, which a small GPU would raise here
        if isinstance(module, transformers.Qwen2Model):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation.")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        run("--video_path", CLIP).check_mistake("out of memory", "--batch_size", "--dtype")
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------- checkpoints and their parts


def test_checkpoints_that_are_not_there_or_do_not_read(run, tmp_path, tiny_checkpoint):
    run("--video_path", CLIP, model=tmp_path / "gone").check_mistake(tmp_path / "gone", "--model_path")
    run("--video_path", CLIP, model=tmp_path).check_mistake(tmp_path, "config.json")
    broken = copy_checkpoint(tiny_checkpoint, tmp_path / "broken")
    for content in ("{", "[]", "", '"text"', '{"model_type": "llama"}'):
        (broken / "config.json").write_text(content)
        run("--video_path", CLIP, model=broken).check_mistake(broken)


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_projector_type": "linear"},
        {"mm_audio_projector_type": "linear"},
        {"hidden_size": "wide"},
        {"mm_hidden_size": None},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 0},
        {"mm_vision_select_layer": -99},
        {"vocab_size": 600},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_of_the_configuration_that_does_not_fit(changes, run, tmp_path, tiny_checkpoint):
    broken = copy_checkpoint(tiny_checkpoint, tmp_path / "broken", **changes)
    run("--video_path", CLIP, model=broken).check_mistake()


def test_missing_and_misshapen_weights(run, tmp_path, tiny_checkpoint):
    broken = copy_checkpoint(tiny_checkpoint, tmp_path / "broken")
    file, name = broken / "model.safetensors", "model.bert_gate.2.bias"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    run("--video_path", CLIP, model=broken).check_mistake(broken, name)
    save_file({**weights, name: torch.zeros(7)}, file, {"format": "pt"})
    run("--video_path", CLIP, model=broken).check_mistake(broken, name, "(7,)", "(3,)")
    file.write_bytes(file.read_bytes()[:1000])
    run("--video_path", CLIP, model=broken).check_mistake(broken)
    file.unlink()
    run("--video_path", CLIP, model=broken).check_mistake(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
def test_a_broken_tokenizer(name, run, tmp_path, tiny_checkpoint):
    broken = copy_checkpoint(tiny_checkpoint, tmp_path / "broken")
    (broken / name).write_text("{")
    outcome = run("--video_path", CLIP, model=broken)
    if name == "vocab.json":  # tokenizer.json holds it too
        assert outcome.status == 0
    else:
        outcome.check_mistake(broken)


@pytest.mark.parametrize(
    ("option", "variable", "field", "folder"),
    [
        ("--vision_tower", "HUMANOMNI_VISION_TOWER", "mm_vision_tower", "vision_tower"),
        ("--audio_tower", "HUMANOMNI_AUDIO_TOWER", "mm_audio_tower", "audio_tower"),
        ("--bert_model", "HUMANOMNI_BERT_MODEL", "mm_bert", "bert"),
    ],
)
def test_where_a_tower_is_found(option, variable, field, folder, run, tmp_path, tiny_checkpoint, monkeypatch):
    expected = run("--video_path", CLIP).out
    moved = copy_checkpoint(tiny_checkpoint, tmp_path / "checkpoint", **{field: "no/where"})
    (moved / folder).rename(tmp_path / "elsewhere")
    run("--video_path", CLIP, model=moved).check_mistake(field, "'no/where'", option)
    run("--video_path", CLIP, option, tmp_path / "gone", model=moved).check_mistake(option, tmp_path / "gone")
    assert run("--video_path", CLIP, option, tmp_path / "elsewhere", model=moved).out == expected
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert run("--video_path", CLIP, model=moved).out == expected
    monkeypatch.setenv(variable, "gone")
    run("--video_path", CLIP, model=moved).check_mistake(variable, "'gone'")
    monkeypatch.delenv(variable)
    edit_config(moved, **{field: str(tmp_path / "elsewhere")})
    assert run("--video_path", CLIP, model=moved).out == expected


@pytest.mark.parametrize(
    ("folder", "width", "option", "named"),
    [
        ("vision_tower", "hidden_size", "--vision_tower", ("mm_vision_tower", "mm_hidden_size", "64", "32")),
        ("audio_tower", "d_model", "--audio_tower", ("mm_audio_tower", "audio_hidden_size", "64", "32")),
        ("bert", "hidden_size", "--bert_model", ("mm_bert", "--bert_model", "64", "32")),
    ],
)
def test_a_tower_of_the_wrong_width(folder, width, option, named, run, tmp_path, tiny_checkpoint):
    wide = copy_checkpoint(tiny_checkpoint / folder, tmp_path / "wide", **{width: 64})
    run("--video_path", CLIP, option, wide).check_mistake(wide, *named)


def test_a_tower_without_its_weights(run, tmp_path, tiny_checkpoint):
    for folder, option in (("vision_tower", "--vision_tower"), ("audio_tower", "--audio_tower")):
        tower = copy_checkpoint(tiny_checkpoint / folder, tmp_path / folder)
        weights = load_file(tower / "model.safetensors")
        first = sorted(weights)[0]
        save_file(
            {key: value for key, value in weights.items() if key != first},
            tower / "model.safetensors",
            {"format": "pt"},
        )
        run("--video_path", CLIP, option, tower).check_mistake(tower, first.split(".", 1)[1])
        (tower / "model.safetensors").unlink()
        run("--video_path", CLIP, option, tower).check_mistake(tower)
        (tower / "preprocessor_config.json").write_text("{")
        run("--video_path", CLIP, option, tower).check_mistake(tower)


# ------------------------------------------------------------------------------------------------ a process of its own


def test_help_is_ten_times_faster_than_the_imports():
    def median_seconds(*command) -> float:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        return sorted(times)[1]

    imports = median_seconds("-c", "import torch, transformers")
    assert median_seconds(REPOSITORY / "inference.py", "--help") < imports / 10


def test_the_written_out_lists_are_the_package_s():
    assert tuple(prompts.MODAL_TAGS) == inference.MODALS
    assert prompts.PROMPT_STYLES == inference.PROMPT_STYLES
    assert sorted(processing.ASPECT_RATIOS) == sorted(inference.ASPECT_RATIOS)
    assert ("auto", *loading.DTYPES) == inference.DTYPES
    assert loading.ATTENTION == inference.ATTENTION


def test_from_another_folder_and_not_installed(run, tmp_path, tiny_checkpoint):
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    check = (
        "import sys, runpy; sys.argv[0] = sys.argv.pop(1); sys.path[0] = sys.argv[0].rpartition('/')[0];"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [REPOSITORY / "inference.py", "--model_path", "model", "--video_path", "clip.mp4", *SHORT]
    process = subprocess.run(
        [sys.executable, "-c", check, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == run("--video_path", CLIP).out


def test_an_interrupt_takes_one_line_and_the_work_is_kept(run, media, tmp_path, tiny_checkpoint):
    output = tmp_path / "results.jsonl"
    clips = [tmp_path / f"{i}.mp4" for i in range(8)]
    for clip in clips:
        shutil.copy(media / "one_frame.mp4", clip)
    arguments = ("--video_path", *clips, "--output", output, "--batch_size", "1", "--max_new_tokens", "300")
    with start("--model_path", tiny_checkpoint, *arguments) as process:
        until = time.monotonic() + 120
        while not (output.is_file() and output.read_bytes().count(b"\n")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        outcome = Outcome(None, *process.communicate(timeout=60))
    assert process.returncode == 130
    assert outcome.lines == [f"inference.py: error: interrupted; the same command continues {output}"]
    done = output.read_bytes().count(b"\n")
    assert 1 <= done < len(clips)
    assert f"{done} of 8 clips were done before" in run(*arguments).err
    assert [json.loads(line)["path"] for line in output.read_text().splitlines()] == [str(clip) for clip in clips]


def test_a_closed_pipe_is_no_bug(tiny_checkpoint):
    with start("--model_path", tiny_checkpoint, "--video_path", CLIP, *SHORT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
