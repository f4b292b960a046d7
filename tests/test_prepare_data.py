"""Each set converts exactly from its official layouts, and what is missing, bad or unlike the published set shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import openpyxl
import pytest

from humanomni.prompts import DEFAULT_INSTRUCT, EMOTION_QUESTION
from open_r1 import labels
from open_r1.metrics import is_well_formed
from open_r1.prepare_data import actor_numbers, clip_key, main, probe_clips, ravdess_names, split_words


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Paths of a clip with sound, one without, and one cut in the middle of its data."""
    folder = tmp_path_factory.mktemp("clips")
    for name, with_sound in (("sound", True), ("silent", False)):
        write_clip(folder / f"{name}.mp4", with_sound)
    whole = (folder / "sound.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 3])
    return {name: folder / f"{name}.mp4" for name in ("sound", "silent", "broken")}


def write_clip(path, with_sound):
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=5, width=64, height=64, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=16000, layout="mono") if with_sound else None
        for shade in (0, 100, 200):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8))))
        container.mux(video.encode())
        if audio is not None:
            tone = np.sin(np.arange(9600) / 10, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(audio.encode(frame))
            container.mux(audio.encode())


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_clips(folder, source, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.link(source, folder / name)


def put_xlsx(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def run(*arguments):
    return main([*map(str, arguments), "--workers", "2"])


def sample(video, answer, question=EMOTION_QUESTION):
    return {
        "video": video,
        "conversations": [
            {"from": "human", "value": f"<video>\n<audio>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def counts(report, split, label):
    """The numbers of one line of the report: listed, published, difference, missing, unreadable, no sound, written."""
    lines = [line.split() for line in report.splitlines()]
    return next(line[2:] for line in lines if line[:2] == [split, label])


# --- DFEW -----------------------------------------------------------------------------------------------------------

DFEW_TRAIN, DFEW_TEST = "train(single-labeled)", "test(single-labeled)"


def dfew_official(root, train, test, fold=1):
    put(root / "EmoLabel_DataSplit" / DFEW_TRAIN / f"set_{fold}.csv", train)
    put(root / "EmoLabel_DataSplit" / DFEW_TEST / f"set_{fold}.csv", test)


def test_dfew_official_layout(tmp_path, clips, capsys):
    root, out = tmp_path / "data" / "DFEW", tmp_path / "out"
    dfew_official(root, "video_name,label\n1,1\n2,2\n3,3\n16,7\n", "video_name,label\n4,4\n5,5\n6,6\n", fold=2)
    put_clips(root / "Clip" / "original", clips["sound"], ["1.mp4", "2.mp4", "4.mp4", "5.mp4", "16.mp4"])
    put_clips(root / "Clip" / "original", clips["silent"], ["6.mp4"])
    put_xlsx(
        root / "Annotation" / "annotation.xlsx",
        [["1happy", "2sad", "order", "label"], [9, 1, 1, 1], [0, 9, 2, 2], [5, 5, 3, 0], [1, 1, 16, 7]]
        + [[0, 0, number, number] for number in (4, 5, 6)],
    )
    assert run("dfew", "--root", root, "--fold", 2, "--output", out) == 0
    report = capsys.readouterr().out
    assert read(out / "train.json") == [
        sample("DFEW/Clip/original/1.mp4", "happy"),
        sample("DFEW/Clip/original/2.mp4", "sad"),
        sample("DFEW/Clip/original/16.mp4", "fear"),
    ]
    assert read(out / "test.json") == [
        sample("DFEW/Clip/original/4.mp4", "angry"),
        sample("DFEW/Clip/original/5.mp4", "surprise"),
        sample("DFEW/Clip/original/6.mp4", "disgust"),
    ]
    assert (out / "missing.txt").read_text() == "3\ttrain\n"
    assert (out / "without_sound.txt").read_text() == "DFEW/Clip/original/6.mp4\n"
    assert counts(report, "train", "all") == ["4", "9356", "-9352", "1", "0", "0", "3"]
    assert counts(report, "train", "neutral") == ["1", "-", "-", "1", "0", "0", "0"]
    assert counts(report, "test", "all") == ["3", "2341", "-2338", "0", "0", "1", "3"]
    assert counts(report, "train+test", "all") == ["7", "11697", "-11690", "1", "0", "1", "6"]
    assert "annotation.xlsx: 6 (published 11697, difference -11691) clips with a single label" in report
    assert "annotation.xlsx: 1 clips of the split have another label: 3" in report
    assert (out / "report.txt").read_text() == report


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("\ufeffVideo_Name,Label\r\n00001,1\r\n00002,2\r\n", "label,video_name\n4,00004.mp4\n"),
        ("1,1\n2,2\n", "4.0,4.0\n"),
        ("name , LABEL\n 1, 1\n2 ,2 \n\n", "clip id,class\n4,angry\n"),
    ],
    ids=["mark_case_zeros", "no_header_floats", "blanks_other_names"],
)
def test_dfew_second_layout_with_quirks(tmp_path, clips, train, test):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    put(root / "label" / "single_trainset_1.csv", train)
    put(root / "label" / "single_testset_1.csv", test)
    put_clips(root / "videos", clips["sound"], ["1.mp4", "00002.mp4", "4.avi", "4.mp4"])
    assert run("dfew", "--root", root, "--fold", 1, "--output", out) == 0
    assert read(out / "train.json") == [sample("DFEW/videos/1.mp4", "happy"), sample("DFEW/videos/00002.mp4", "sad")]
    assert read(out / "test.json") == [sample("DFEW/videos/4.mp4", "angry")]


def test_dfew_of_full_size_shows_no_difference(tmp_path, clips, capsys):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    ids = {label: number for number, label in labels.DFEW_IDS.items()}
    test = [ids[label] for label, count in labels.DFEW_FOLD_1_TEST_COUNTS.items() for _ in range(count)]
    dfew_official(
        root,
        "video_name,label\n" + "".join(f"{number},1\n" for number in range(2342, 11698)),
        "video_name,label\n" + "".join(f"{number},{label}\n" for number, label in enumerate(test, start=1)),
    )
    put_clips(root / "videos", clips["sound"], ["1.mp4"])
    assert run("dfew", "--root", root, "--fold", 1, "--output", out) == 0
    report = capsys.readouterr().out
    for split, label in (
        ("train", "all"),
        ("test", "all"),
        ("train+test", "all"),
        ("test", "happy"),
        ("test", "fear"),
    ):
        assert counts(report, split, label)[2] == "+0"
    assert counts(report, "test", "disgust")[:3] == ["29", "29", "+0"]
    assert len((out / "missing.txt").read_text().splitlines()) == 11696


def test_dfew_folders_of_frames_are_clips_without_sound(tmp_path, clips, capsys):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    dfew_official(root, "video_name,label\n7,1\n", "video_name,label\n8,2\n")
    with av.open(str(clips["silent"])) as container:
        image = next(container.decode(video=0)).to_image()
    for number in ("00007", "00008"):
        (root / "Clip" / "clip_224x224" / number).mkdir(parents=True)
        image.save(root / "Clip" / "clip_224x224" / number / "1.jpg")
    assert run("dfew", "--root", root, "--fold", 1, "--output", out, "--check-media") == 0
    assert counts(capsys.readouterr().out, "train+test", "all")[3:] == ["0", "0", "2", "2"]
    assert read(out / "train.json") == [sample("DFEW/Clip/clip_224x224/00007", "happy")]


# --- MAFW -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["Train & Test Set", "split"])
def test_mafw_single_labels(tmp_path, clips, capsys, top):
    root, out = tmp_path / "MAFW", tmp_path / "out"
    words = list(labels.MAFW_WORDS)
    folder = root / top / "single" / "no_caption" / "set_3"
    put(folder / "train.txt", "".join(f"{19 + i:05d}.mp4 {word}\n" for i, word in enumerate(words)))
    put(folder / "test.txt", "00903.mp4 anger\r\n20098.mp4 neutral\r\n")
    names = [f"{19 + i:05d}.mp4" for i in range(11)]
    put_clips(root / "data" / "clips", clips["sound"], [*names, "20098.mp4"])
    put_clips(root / "data" / "clips", clips["silent"], ["00903.mp4"])
    assert run("mafw", "--root", root, "--fold", 3, "--output", out) == 0
    report = capsys.readouterr().out
    assert [entry["conversations"][1]["value"] for entry in read(out / "train.json")] == list(labels.CLASSES["mafw"])
    assert [entry["video"] for entry in read(out / "train.json")] == [f"MAFW/data/clips/{name}" for name in names]
    assert read(out / "test.json") == [
        sample("MAFW/data/clips/00903.mp4", "angry"),
        sample("MAFW/data/clips/20098.mp4", "neutral"),
    ]
    assert counts(report, "train", "all")[:3] == ["11", "7339", "-7328"]
    assert counts(report, "test", "all") == ["2", "1833", "-1831", "0", "0", "1", "2"]
    assert counts(report, "train+test", "angry")[:3] == ["2", "1390", "-1388"]
    assert counts(report, "train+test", "all")[1] == "9172"
    assert "1 of the 16 single-label clips known to be without sound are listed" in report


def test_mafw_captions_that_are_not_utf8(tmp_path, clips, capsys):
    root, out = tmp_path / "MAFW", tmp_path / "out"
    folder = root / "Train & Test Set" / "single" / "with_caption" / "set_1"
    lines = '00019.mp4\tcontempt\t他"冷笑\tHe "sneers, twice.\n00020.mp4\tanxiety\t焦虑 不安\tworried  look\n'
    put(folder / "train.txt", lines.encode("gb18030"))
    put(folder / "test.txt", "00021.mp4\thelplessness\tcaf\xe9\tcaf\xe9\n".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        (folder / "train.txt").read_text(encoding="utf-8")
    put_clips(root / "data" / "clips", clips["sound"], ["00019.mp4", "00020.mp4", "00021.mp4"])
    put_xlsx(root / "Labels" / "single-set.xlsx", [["00019.mp4", 8], ["00020.mp4", 9], ["00021.mp4", 11]])
    assert run("mafw", "--root", root, "--fold", 1, "--labels", "single/with_caption", "--output", out) == 0
    report = capsys.readouterr().out
    assert read(out / "train.json") == [
        sample("MAFW/data/clips/00019.mp4", "contemptuous"),
        sample("MAFW/data/clips/00020.mp4", "anxious"),
    ]
    assert read(out / "test.json") == [sample("MAFW/data/clips/00021.mp4", "helpless")]
    assert counts(report, "train+test", "all")[:3] == ["3", "8034", "-8031"]
    assert "single-set.xlsx: 1 clips of the split have another label: 00021.mp4" in report


def test_mafw_compound_labels(tmp_path, clips, capsys):
    root, out = tmp_path / "MAFW", tmp_path / "out"
    folder = root / "split" / "compound" / "no_caption" / "set_5"
    put(folder / "train.txt", "00019.mp4 anger_disgust\n00020.mp4 sadness\n")
    put(folder / "test.txt", "00021.mp4 sadness_helplessness_disappointment\n")
    put_clips(root / "clips", clips["sound"], ["00019.mp4", "00020.mp4", "00021.mp4"])
    assert run("mafw", "--root", root, "--fold", 5, "--labels", "compound/no_caption", "--output", out) == 0
    assert read(out / "train.json") == [
        sample("MAFW/clips/00019.mp4", "angry, disgust"),
        sample("MAFW/clips/00020.mp4", "sad"),
    ]
    assert read(out / "test.json") == [sample("MAFW/clips/00021.mp4", "sad, helpless, disappointed")]
    assert "8996" in capsys.readouterr().out


def test_repeated_clips_and_clips_of_both_splits_are_left_out_and_named(tmp_path, clips, capsys):
    root, out = tmp_path / "MAFW", tmp_path / "out"
    folder = root / "split" / "single" / "no_caption" / "set_1"
    put(folder / "train.txt", "00019.mp4 anger\n19.mp4 fear\n00020.mp4 fear\n")
    put(folder / "test.txt", "00020.mp4 fear\n00021.mp4 fear\n")
    put_clips(root / "clips", clips["sound"], ["00019.mp4", "00020.mp4", "00021.mp4"])
    assert run("mafw", "--root", root, "--fold", 1, "--output", out) == 0
    report = capsys.readouterr().out
    assert "1 repeated lines left out: 19.mp4" in report
    assert "1 clips are in train and test, and left out of test: 00020.mp4" in report
    assert read(out / "train.json")[0] == sample("MAFW/clips/00019.mp4", "angry")
    assert read(out / "test.json") == [sample("MAFW/clips/00021.mp4", "fear")]


# --- RAVDESS --------------------------------------------------------------------------------------------------------


def test_ravdess_names_are_those_of_the_set():
    for channel, number in (("01", 60), ("02", 44)):
        names = list(ravdess_names("01", channel, 7))
        assert len(set(names)) == number and all(name.endswith("-07") for name in names)
        assert sum(name[6:8] == "01" for name in names) == 4


@pytest.mark.parametrize("layout", ["Actor_{0:02d}", "Video_Speech_Actor_{0:02d}/Actor_{0:02d}"])
def test_ravdess_fold(tmp_path, clips, capsys, layout):
    root, out = tmp_path / "RAVDESS", tmp_path / "out"
    for actor in (4, 5):
        for modality in ("01", "02"):
            stems = ravdess_names(modality, "01", actor)
            put_clips(root / layout.format(actor), clips["sound"], [f"{stem}.mp4" for stem in stems])
    put_clips(root / layout.format(5), clips["sound"], ["01-01-01-02-01-01-05.mp4"])  # neutral is never strong
    (root / layout.format(5) / "01-01-08-02-02-02-05.mp4").unlink()
    assert run("ravdess", "--root", root, "--fold", 2, "--output", out) == 0
    report = capsys.readouterr().out
    train, test = read(out / "train.json"), read(out / "test.json")
    words = {"fearful": "fear", "surprised": "surprise"}
    names = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
    assert test == [
        sample(f"RAVDESS/{layout.format(5)}/{stem}.mp4", words.get(emotion, emotion))
        for stem in sorted(ravdess_names("01", "01", 5))
        for emotion in [names[int(stem.split("-")[2]) - 1]]
        if stem != "01-01-08-02-02-02-05"
    ]
    assert len(train) == 60 and all("/Actor_04/" in entry["video"] for entry in train)
    assert counts(report, "train", "all") == ["1200", "1200", "+0", "1140", "0", "0", "60"]
    assert counts(report, "test", "surprise") == ["32", "32", "+0", "25", "0", "0", "7"]
    assert counts(report, "train+test", "neutral")[:1] == ["96"]
    assert "test actors: 5, 6, 7, 8" in report
    assert "1 file names outside the scheme are ignored: 01-01-01-02-01-01-05.mp4" in report


def test_ravdess_defaults_to_a_test_set_of_all_actors(tmp_path, clips, capsys):
    root, out = tmp_path / "RAVDESS", tmp_path / "out"
    put_clips(root / "Actor_24", clips["sound"], ["01-01-06-01-01-01-24.mp4", "01-02-03-01-01-01-24.mp4"])
    assert run("ravdess", "--root", root, "--output", out) == 0
    assert read(out / "test.json") == [sample("RAVDESS/Actor_24/01-01-06-01-01-01-24.mp4", "fear")]
    assert not (out / "train.json").exists()
    assert counts(capsys.readouterr().out, "test", "all")[:2] == ["1440", "1440"]

    assert run("ravdess", "--root", root, "--channel", "02", "--test-actors", "1-23", "--output", out) == 0
    assert read(out / "test.json") == []
    assert read(out / "train.json") == [sample("RAVDESS/Actor_24/01-02-03-01-01-01-24.mp4", "happy")]
    assert counts(capsys.readouterr().out, "train+test", "all")[:2] == ["1012", "1012"]


def test_actor_numbers():
    assert actor_numbers("20-24") == {20, 21, 22, 23, 24}
    assert actor_numbers("1, 2,5") == {1, 2, 5}


# --- EMER -----------------------------------------------------------------------------------------------------------

V2 = "name,chinese,english\n" + "".join(
    f'sample_0000000{i},"他,{i}","Reason {i},\nin two lines."\n' for i in (1, 2, 3, 4)
)
OPENSET = "name,openset\n" + "".join(
    f'sample_0000000{i},"{words}"\n'
    for i, words in ((1, "['tense', 'worried', 'angry']"), (2, "['Sad']"), (3, "['curious']"))
)


def cold(video, reason, label):
    entry = sample(video, f"<think>{reason}</think>\n<answer>{label}</answer>", DEFAULT_INSTRUCT)
    assert is_well_formed(entry["conversations"][1]["value"])
    return entry


def test_emer_v2_with_openset_labels(tmp_path, clips, capsys):
    root, out = tmp_path / "MER24", tmp_path / "out"
    put(root / "final-EMER-reason.csv", V2)
    put(root / "labels" / "check-openset.csv", OPENSET)
    put_clips(root / "video", clips["sound"], ["sample_00000001.mp4", "sample_00000002.avi", "sample_00000003.mp4"])
    assert run("emer", "--root", root, "--output", out) == 0
    report = capsys.readouterr().out
    assert read(out / "train.json") == [
        cold("MER24/video/sample_00000001.mp4", "Reason 1,\nin two lines.", "anxious"),
        cold("MER24/video/sample_00000002.avi", "Reason 2,\nin two lines.", "sad"),
    ]
    assert "final-EMER-reason.csv: 4 (published 332, difference -328) rows" in report
    without = "2 left out without a label among R1-Omni's words: sample_00000003, sample_00000004"
    assert without in report

    assert run("emer", "--root", root, "--language", "chinese", "--output", out) == 0
    assert read(out / "train.json")[0] == cold("MER24/video/sample_00000001.mp4", "他,1", "anxious")


def test_emer_discrete_labels_go_before_openset_ones(tmp_path, clips):
    root, out = tmp_path / "MER24", tmp_path / "out"
    put(root / "final-EMER-reason.csv", V2)
    put(root / "check-openset.csv", OPENSET)
    put(root / "train-label.csv", "name,discrete,valence\nsample_00000001,worried,-2\nsample_00000002,angry,-1\n")
    put(root / "label-disdim.csv", "\ufeffname,discrete\nsample_00000004,happy\n")
    put_clips(root / "video", clips["sound"], [f"sample_0000000{i}.mp4" for i in (1, 2, 3, 4)])
    assert run("emer", "--root", root, "--output", out) == 0
    answers = [entry["conversations"][1]["value"].rsplit("<answer>")[1] for entry in read(out / "train.json")]
    assert answers == ["anxious</answer>", "angry</answer>", "happy</answer>"]


def test_emer_v1_and_mer2025(tmp_path, clips, capsys):
    root, out = tmp_path / "EMER", tmp_path / "out"
    put(
        root / "gt-eng.csv",
        "names,emotions,subtitles,reasons\n"
        'sample_00000001,"surprise, happy",Oh!,She smiles.\n'
        "sample_00000002,anger,No!,\n"
        "sample_00000003,anger,No!,He says </think> here.\n",
    )
    put(root / "track3_train.csv", "name,reason\nsample_00000001,Later.\nsample_00000009,He cries.\n")
    put(root / "track2_train_human.csv", "name,openset\nsample_00000009,\"['sorrowful', 'angry']\"\n")
    put_clips(root / "video", clips["sound"], [f"sample_0000000{i}.mp4" for i in (1, 2, 3, 9)])
    assert run("emer", "--root", root, "--output", out) == 0
    report = capsys.readouterr().out
    assert read(out / "train.json") == [
        cold("EMER/video/sample_00000001.mp4", "She smiles.", "surprise"),
        cold("EMER/video/sample_00000009.mp4", "He cries.", "sad"),
    ]
    assert "gt-eng.csv: 1 left out without a reason: sample_00000002" in report
    assert "gt-eng.csv: 1 left out with a tag of the answer format in the reason: sample_00000003" in report


def test_split_words():
    assert split_words("['worried', 'very sad']") == ["worried", "very sad"]
    assert split_words("worried, sad") == ["worried", " sad"]
    assert split_words("[worried") == ["worried"]
    assert split_words("worried\uff0csad") == ["worried", "sad"]


# --- media ----------------------------------------------------------------------------------------------------------


def bad_tree(root, clips):
    dfew_official(root, "video_name,label\n1,1\n2,2\n3,3\n", "video_name,label\n4,4\n")
    put_clips(root / "videos", clips["sound"], ["1.mp4", "4.mp4"])
    put_clips(root / "videos", clips["broken"], ["2.mp4"])
    put_clips(root / "videos", clips["silent"], ["3.mp4"])


def test_check_media_leaves_bad_clips_out_and_names_them(tmp_path, clips, capsys):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    bad_tree(root, clips)
    assert run("dfew", "--root", root, "--fold", 1, "--output", out, "--check-media") == 0
    captured = capsys.readouterr()
    assert [entry["video"] for entry in read(out / "train.json")] == ["DFEW/videos/1.mp4", "DFEW/videos/3.mp4"]
    (line,) = (out / "bad_media.txt").read_text().splitlines()
    path, reason = line.split("\t")
    assert path == "DFEW/videos/2.mp4" and reason
    assert counts(captured.out, "train", "all")[3:] == ["0", "1", "1", "2"]
    assert "1 clips cannot be read, and are left out: see bad_media.txt" in captured.out
    assert "opening clips" in captured.err


def test_without_check_media_a_bad_clip_is_counted_and_stays(tmp_path, clips, capsys):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    bad_tree(root, clips)
    assert run("dfew", "--root", root, "--fold", 1, "--output", out) == 0
    report = capsys.readouterr().out
    assert len(read(out / "train.json")) == 3 and not (out / "bad_media.txt").exists()
    assert "1 clips cannot be opened, but stay in the lists: run again with --check-media" in report


def test_the_same_input_gives_the_same_bytes(tmp_path, clips):
    bad_tree(tmp_path / "DFEW", clips)
    for name in ("a", "b"):
        assert run("dfew", "--root", tmp_path / "DFEW", "--fold", 1, "--output", tmp_path / name, "--check-media") == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["bad_media.txt", "missing.txt", "report.txt", "test.json", "train.json", "without_sound.txt"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Deadly(os.PathLike):
    """A path that kills the process that looks at it, as a decoder does on some damaged headers."""

    def __fspath__(self):
        os.abort()

    def is_file(self):
        os.abort()


def test_a_clip_that_kills_its_process_is_a_bad_clip(tmp_path, clips):
    names = [f"{number}.mp4" for number in range(300)]
    put_clips(tmp_path, clips["silent"], names)
    many = [tmp_path / name for name in names]
    deadly = [Deadly(), Deadly()]
    results = probe_clips([deadly[0], clips["sound"], *many, deadly[1], clips["broken"]], False, 2)
    assert results[clips["sound"]] == (None, True)
    assert all(results[path] == (None, False) for path in many)
    assert results[clips["broken"]][0] and results[clips["broken"]][1] is None
    assert all(results[path] == ("the process that read it died", None) for path in deadly)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        (["dfew", "--fold", 1], "EmoLabel_DataSplit/"),
        (["mafw", "--fold", 1], "Train & Test Set/"),
        (["ravdess"], "Actor_01/"),
        (["emer"], "final-EMER-reason.csv, check-openset.csv"),
    ],
)
def test_a_wrong_root_shows_the_expected_tree(tmp_path, capsys, arguments, tree):
    put(tmp_path / "root" / "readme.txt", "")
    assert run(*arguments, "--root", tmp_path / "root", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "root") in error.splitlines()[0] and tree in error
    assert not (tmp_path / "out").exists()

    assert run(*arguments, "--root", tmp_path / "nowhere", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.strip() == (
        f"error: --root {tmp_path / 'nowhere'} is not a folder; give the folder of the set"
    )


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("video_name,label\n1,8\n", ["'1'", "'8'", "1, 2, 3"]),
        ("video_name,label\n1,1\n2\n", ["'2'", "''"]),
        ("video_name,valence\n1,1\n", ["video_name, valence", "label"]),
        ('video_name,label\n1,"1\n', ["cannot be read"]),
        ("", ["cannot be read"]),
    ],
)
def test_a_label_file_that_cannot_be_used_is_named(tmp_path, clips, capsys, train, words):
    dfew_official(tmp_path / "DFEW", train, "video_name,label\n4,4\n")
    put_clips(tmp_path / "DFEW" / "videos", clips["sound"], ["1.mp4"])
    assert run("dfew", "--root", tmp_path / "DFEW", "--fold", 1, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "set_1.csv" in error and all(word in error for word in words)


def test_clips_that_cannot_be_found_or_placed(tmp_path, clips, capsys):
    root, out = tmp_path / "DFEW", tmp_path / "out"
    dfew_official(root, "video_name,label\n1,1\n", "video_name,label\n2,2\n")
    arguments = ("dfew", "--root", root, "--fold", 1, "--output", out)
    assert run(*arguments) == 2
    assert "none of the 2 listed clips is in videos, Clip/original" in capsys.readouterr().err
    put_clips(root / "elsewhere", clips["sound"], ["1.mp4"])
    assert run(*arguments, "--clips", "elsewhere", "--data-root", root / "videos") == 2
    assert "--data-root" in capsys.readouterr().err
    assert run(*arguments, "--clips", "elsewhere", "--data-root", root) == 0
    assert read(out / "train.json") == [sample("elsewhere/1.mp4", "happy")]
    (out / "train.json").unlink()
    (out / "train.json").mkdir()
    assert run(*arguments, "--clips", "elsewhere") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list(out.glob(".*"))


def test_clip_key_reads_names_as_text():
    assert {clip_key(name) for name in ("00019.mp4", "19", "19.0", "clips/0019.AVI", " 19 ", "c\\19.mp4")} == {"19"}
    assert clip_key("0") == "0" and clip_key("sample_00000967.mp4") == "sample_00000967"
    assert clip_key("01-01-01-01-01-01-01.mp4") == clip_key("01-01-01-01-01-01-01")


def test_help_needs_no_table_reader_and_every_command_has_it():
    code = (
        "import sys\nfrom open_r1.prepare_data import main\n"
        "try:\n    main(['dfew', '--help'])\nfinally:\n    print('pandas' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "EmoLabel_DataSplit/" in done.stdout and done.stdout.endswith("\nFalse\n")
    for command in ("dfew", "mafw", "ravdess", "emer", "merge"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["dfew", "--root", "x", "--output", "y"],
        ["dfew", "--root", "x", "--output", "y", "--fold", "6"],
        ["ravdess", "--root", "x", "--output", "y", "--test-actors", "0,25"],
        ["ravdess", "--root", "x", "--output", "y", "--test-actors", "a"],
        ["merge", "x.json", "--output", "y", "--limit", "0"],
    ],
)
def test_mistaken_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


# --- merge ----------------------------------------------------------------------------------------------------------


def two_lists(folder):
    put(folder / "mafw" / "train.json", json.dumps([sample(f"MAFW/{i}.mp4", "sad") for i in range(30)]))
    rows = [sample(f"DFEW/{i}.mp4", "happy") for i in range(20)]
    rows += [sample("DFEW/./0.mp4", "happy"), sample("MAFW/3.mp4", "fear")]
    put(folder / "dfew.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    return [f"mafw={folder / 'mafw' / 'train.json'}", f"dfew={folder / 'dfew.jsonl'}"]


def videos(path):
    return [entry["video"] for entry in read(path)]


def test_merge_joins_drops_repeated_and_follows_the_seed(tmp_path, capsys):
    lists = two_lists(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["merge", *lists, "--output", str(tmp_path / f"{name}.json"), "--seed", str(seed)]) == 0
    report = capsys.readouterr().out
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    expected = {f"MAFW/{i}.mp4" for i in range(30)} | {f"DFEW/{i}.mp4" for i in range(20)}
    assert a.read_bytes() == b.read_bytes()
    assert videos(a) != videos(c) and sorted(videos(a)) == sorted(videos(c)) == sorted(expected)
    assert videos(a) != sorted(videos(a), key=lambda video: ("D" in video, video))
    assert "dfew: 22 samples, 2 left out as repeated (1 of them with another answer), 20 taken" in report
    assert sample("MAFW/3.mp4", "sad") in read(a)


def test_merge_takes_and_limits(tmp_path, capsys):
    lists, out = two_lists(tmp_path), tmp_path / "out.json"
    arguments = ["merge", *lists, "--output", str(out)]
    assert main([*arguments, "--take", "mafw=7", "--take", "dfew=3"]) == 0
    assert sorted(video[:4] for video in videos(out)) == ["DFEW"] * 3 + ["MAFW"] * 7
    assert main([*arguments, "--limit", "5"]) == 0
    assert len(set(videos(out))) == 5
    assert f"{out}: 5 samples, seed 42" in capsys.readouterr().out


def test_merge_keeps_the_users_own_list_word_for_word(tmp_path, capsys):
    own = {"video": "my/1.mp4", "note": "kept", **sample("", "<think>Ü</think>\n<answer>calm</answer>")}
    own["video"] = "my/1.mp4"
    text_only = {"conversations": own["conversations"]}
    put(tmp_path / "own.json", json.dumps([own, text_only, text_only]))
    assert main(["merge", str(tmp_path / "own.json"), "--output", str(tmp_path / "out.json")]) == 0
    merged = read(tmp_path / "out.json")
    assert len(merged) == 3 and own in merged and merged.count(text_only) == 2
    assert "  3 calm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "extra", "words"),
    [
        ("[", [], ["x.json", "cannot be read"]),
        ("{}", [], ["x.json", "not a list"]),
        ('[{"video": "a.mp4"}]', [], ["x.json", "entry 0", "conversations"]),
        ('[{"video": 1, "conversations": []}]', [], ["entry 0"]),
        ("[]", ["--take", "y=1"], ["--take", "y=1", "NAME"]),
        ("[]", ["--take", "x=1"], ["--take x=1", "more than the 0"]),
        ("[]", ["x=x.json"], ["have one name"]),
    ],
)
def test_merge_mistakes_are_one_line(tmp_path, capsys, monkeypatch, content, extra, words):
    monkeypatch.chdir(tmp_path)
    put(Path("x.json"), content)
    assert main(["merge", "x=x.json", *extra, "--output", "out.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not Path("out.json").exists()
