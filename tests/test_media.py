"""Reading media: against the released code's recorded frames and waves, against ffmpeg, and against bad files."""

import json
import logging
import os
import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import decord
import media_factory as make
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from humanomni import media
from humanomni.errors import MediaError
from humanomni.media import frame_range, read_frames, read_image, read_waveform, sample_frame_indices

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "assets" / "example.mp4"
CLIPS = ("m1_chirp", "m2_short", "m3_speech", "m4_noaudio")


@pytest.fixture(scope="module")
def golden() -> Path:
    root = Path(os.environ.get("R1_OMNI_GOLDEN", REPOSITORY.parent / "shared" / "golden")) / "setA"
    if not root.is_dir():
        pytest.skip(f"no recordings of the released code at {root}; set R1_OMNI_GOLDEN")
    return root


@pytest.fixture(scope="module")
def recorded(golden) -> dict:
    return {
        "facts": json.loads((golden / "golden" / "media.json").read_text()),
        "video": np.load(golden / "golden" / "media_video.npz"),
        "audio": np.load(golden / "golden" / "media_audio.npz"),
    }


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


# ---------------------------------------------------------------------------------------------------------- sampling


@given(available=st.integers(1, 500_000), wanted=st.integers(1, 128))
def test_sampling_is_ordered_in_range_and_symmetric(available, wanted):
    indices = sample_frame_indices(available, wanted)
    assert indices.dtype == np.int64 and indices.shape == (wanted,)
    assert indices[0] >= 0 and indices[-1] <= available - 1
    assert (np.diff(indices) >= 0).all()
    assert np.abs(indices + indices[::-1] - (available - 1)).max() <= 1
    if available > wanted:
        assert len(set(indices.tolist())) == wanted


def test_sampling_known_values():
    assert sample_frame_indices(75, 8).tolist() == [5, 14, 23, 32, 42, 51, 60, 69]
    assert sample_frame_indices(5, 8).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sample_frame_indices(1, 4).tolist() == [0, 0, 0, 0]


def test_sampling_equals_release(golden):
    rows = json.loads((golden / "golden" / "frame_sample.json").read_text())["uniform"]
    assert len(rows) > 50
    for row in rows:
        assert sample_frame_indices(row["duration"], row["num_frames"]).tolist() == row["ids"], row


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(None, None, (0, 74)), (0.5, 1.5, (11, 36)), (0, 99, (0, 74)), (2.96, None, (73, 74)), (None, 0.04, (0, 0))],
)
def test_frame_range(start, end, expected):
    assert frame_range(75, 25.0, start, end) == expected


@pytest.mark.parametrize(
    ("start", "end"), [(3.0, None), (2, 1), (1, 1), (-1, None), (None, -1), (0, 0.01), (float("nan"), None)]
)
def test_frame_range_refuses(start, end):
    with pytest.raises(MediaError) as error:
        frame_range(75, 25.0, start, end)
    assert "\n" not in str(error.value)
    if start != -1 and end != -1 and start == start:
        assert "3.00 seconds" in str(error.value)


# ----------------------------------------------------------------------------------------------- recorded release


@pytest.mark.parametrize("clip", CLIPS)
def test_frames_equal_release(golden, recorded, clip):
    path, facts = golden / "media" / f"{clip}.mp4", recorded["facts"]["video"][clip]
    if clip == "m1_chirp":
        np.testing.assert_array_equal(pixels(read_frames(path, 8))[::2], recorded["video"][f"{clip}.decoded.8.even"])
    else:
        every = read_frames(path, facts["frames"])
        first_and_last = recorded["video"][f"{clip}.decoded_first_last"]
        # The rule skips the very first and last frame of long clips: ask it for one frame per border instead.
        borders = media._frames_by_decord(path, lambda n, fps: np.array([0, n - 1]))
        np.testing.assert_array_equal(np.stack(borders), first_and_last)
        assert len(every) == facts["frames"] and every[0].size == (facts["hw"][1], facts["hw"][0])


def test_range_equals_release(golden, recorded):
    path, facts = golden / "media" / "m1_chirp.mp4", recorded["facts"]["video"]["m1_chirp"]["s0.5e1.5"]
    expected = media._frames_by_decord(path, lambda n, fps: np.array(facts["ids"]))
    np.testing.assert_array_equal(pixels(read_frames(path, 8, start=0.5, end=1.5)), np.stack(expected))


@pytest.mark.parametrize("clip", [*CLIPS, "m5_audio_only"])
def test_waves_equal_release(golden, recorded, clip):
    path = next((golden / "media").glob(f"{clip}.*"))
    wave, expected = read_waveform(path), recorded["audio"][f"{clip}.wave"]
    assert wave.dtype == np.float32 and wave.shape == (recorded["facts"]["audio"][clip]["samples"],)
    np.testing.assert_array_equal(wave[: len(expected)], expected)


def test_short_array_is_padded_like_release(recorded):
    array = recorded["video"]["ndarray3.input"]
    frames = read_frames(array, 8)
    np.testing.assert_array_equal(pixels(frames[:3]), array)
    assert [frame.size for frame in frames[3:]] == [(72, 96), (96, 72), (72, 96), (96, 72), (72, 96)]
    assert not any(np.asarray(frame).any() for frame in frames[3:])


def test_bundled_clip_reads_as_recorded():
    """Figures of assets/example.mp4 as read when it was made: they hold without the recordings."""
    frames, wave = pixels(read_frames(EXAMPLE, 8)), read_waveform(EXAMPLE)
    assert frames.shape == (8, 224, 224, 3)
    expected = [171.4493, 171.4361, 171.0597, 171.1851, 171.3018, 171.3865, 171.0365, 171.5795]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), expected, atol=0.01)
    assert len(wave) == 63902
    assert wave.sum() == pytest.approx(39.9078, abs=0.01)
    assert np.square(wave).sum() == pytest.approx(593.920, abs=0.01)
    assert np.abs(wave).max() == pytest.approx(0.628704, abs=1e-5)


# ------------------------------------------------------------------------------------------------ frames: two readers

READABLE = [
    ("clip.mp4", "libx264", (96, 72), ()),
    ("bframes.mp4", "libx264", (64, 48), ("-bf", "3", "-g", "5")),
    ("clip.mkv", "libx264", (64, 48), ()),
    ("fragments.mp4", "libx264", (64, 48), ("-movflags", "frag_keyframe+empty_moov")),
    ("vp9.webm", "libvpx-vp9", (64, 48), ()),
    ("narrow16.mp4", "libx264", (16, 32), ()),
    ("narrow24.mp4", "libx264", (24, 32), ()),
    ("narrow48.mp4", "libx264", (48, 64), ()),
    ("narrow72.mp4", "libx264", (72, 64), ()),
    ("wide80.mp4", "libx264", (80, 60), ()),
    ("wide112.mp4", "libx264", (112, 64), ()),
    ("odd.mp4", "libx264", (58, 34), ()),
    ("av1.mp4", "libsvtav1", (64, 64), ()),
    ("hevc.mp4", "libx265", (64, 48), ("-x265-params", "log-level=none")),
    ("h264.avi", "libx264", (64, 48), ("-bf", "2", "-g", "5")),
    ("mpeg4.avi", "mpeg4", (64, 48), ("-bf", "2", "-g", "5")),
    ("mpeg4.mp4", "mpeg4", (64, 48), ("-bf", "2", "-g", "5")),
    ("stream.ts", "libx264", (64, 48), ("-g", "5")),
    ("program.mpg", "mpeg2video", (64, 48), ("-r", "25", "-g", "5")),
    ("clip.wmv", "wmv2", (64, 48), ()),
]


@pytest.mark.parametrize(("name", "codec", "size", "options"), READABLE, ids=[row[0] for row in READABLE])
def test_frames_equal_ffmpeg(tmp_path, name, codec, size, options):
    if not make.has_encoder(codec):
        pytest.skip(f"this ffmpeg cannot encode {codec}")
    path = make.make_video(tmp_path / name, *options, size=size, seconds=2.4, codec=codec)
    every = make.decode_frames(path, size)
    for wanted in (1, 4, len(every), 40):
        expected = every[sample_frame_indices(len(every), wanted)]
        np.testing.assert_array_equal(pixels(read_frames(path, wanted)), expected)


def test_decord_reads_first_and_a_second_reader_is_logged(tmp_path, caplog, monkeypatch):
    good = make.make_video(tmp_path / "good.mp4")
    with caplog.at_level(logging.INFO, "humanomni.media"):
        read_frames(good, 2)
        assert not caplog.records
        read_frames(make.make_video(tmp_path / "narrow.mp4", size=(48, 64)), 2)
    assert "narrow.mp4" in caplog.text and "48 pixels wide" in caplog.text
    expected = pixels(read_frames(good, 4))
    monkeypatch.setattr(media, "_decord_mistakes_padding", lambda width: False)
    caplog.clear()
    # Without the rule, decord itself fails on this width, and PyAV takes over with a warning.
    read_frames(tmp_path / "narrow.mp4", 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    by_pyav = media._frames_by_pyav(good, lambda n, fps: sample_frame_indices(n, 4))
    np.testing.assert_array_equal(np.stack(by_pyav), expected)


def test_padding_rule_names_exactly_the_widths_decord_fails_on(tmp_path):
    for width in range(16, 102, 2):
        path = make.make_video(tmp_path / f"{width}.mp4", size=(width, 16), seconds=0.1)
        try:
            media._frames_by_decord(path, lambda n, fps: np.array([0]))
            fails = False
        except decord.DECORDError:
            fails = True
        assert fails == media._decord_mistakes_padding(width), width


@pytest.mark.parametrize(
    "flag", ["-display_rotation 90", "-display_rotation 180", "-display_rotation 270", "-display_hflip"]
)
def test_rotated_clips_come_out_upright(tmp_path, flag):
    make.make_video(tmp_path / "flat.mkv", size=(96, 64))
    path = tmp_path / "turned.mp4"
    make.ffmpeg(*flag.split(), "-i", tmp_path / "flat.mkv", "-c", "copy", path)
    size = (64, 96) if flag.endswith(("90", "270")) else (96, 64)
    frames = read_frames(path, 4)
    assert frames[0].size == size
    if flag == "-display_hflip":
        flat = pixels(read_frames(tmp_path / "flat.mkv", 4))
        np.testing.assert_array_equal(pixels(frames), flat[:, :, ::-1])
    else:
        every = make.decode_frames(path, size)
        np.testing.assert_array_equal(pixels(frames), every[sample_frame_indices(len(every), 4)])


def test_frames_hidden_by_an_edit_list_stay_hidden(tmp_path):
    whole = make.make_video(tmp_path / "whole.mp4", "-g", "20", seconds=6)
    make.ffmpeg("-ss", "3.3", "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    every = make.decode_frames(tmp_path / "cut.mp4", (64, 48))
    assert len(every) < 60
    expected = every[sample_frame_indices(len(every), 8)]
    np.testing.assert_array_equal(pixels(read_frames(tmp_path / "cut.mp4", 8)), expected)


def test_names_that_ffmpeg_could_misread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.make_video(tmp_path / "plain.mp4", audio=True).rename("a:b %03d 'é'.mp4")
    assert len(read_frames("a:b %03d 'é'.mp4", 8)) == 8
    assert len(read_waveform("a:b %03d 'é'.mp4")) > 16000


def test_clip_of_one_frame(tmp_path):
    path = make.make_video(tmp_path / "one.mp4", seconds=0.1)
    frames = pixels(read_frames(path, 8))
    assert frames.shape == (8, 48, 64, 3) and (frames == make.decode_frames(path, (64, 48))).all()


def test_threads_read_what_one_reads(tmp_path):
    paths = [make.make_video(tmp_path / f"{w}.mp4", size=(w, 48), audio=True) for w in (48, 64, 80, 96)] * 4
    read = lambda path: (pixels(read_frames(path, 5)), read_waveform(path))  # noqa: E731
    serial = [read(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        for (frames, wave), (serial_frames, serial_wave) in zip(pool.map(read, paths), serial, strict=True):
            np.testing.assert_array_equal(frames, serial_frames)
            np.testing.assert_array_equal(wave, serial_wave)


# ---------------------------------------------------------------------------- frames: folders, GIFs, arrays and images


def test_folder_of_images(tmp_path):
    for i in range(7):
        Image.new("RGB", (10, 6), (i * 30, 0, 0)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    Image.new("RGB", (10, 6), (255, 255, 255)).save(tmp_path / ".hidden.png")
    reds = lambda frames: [frame.getpixel((0, 0))[0] // 30 for frame in frames]  # noqa: E731
    assert reds(read_frames(tmp_path, 7)) == sample_frame_indices(7, 7).tolist()
    assert reds(read_frames(str(tmp_path), 2, start=1, end=2)) == [3, 4]  # of the frames 2 to 5, at 3 a second


def test_gif(tmp_path):
    frames = [Image.new("RGB", (10, 6), (i * 25, 0, 0)) for i in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert [f.getpixel((0, 0))[0] for f in read_frames(tmp_path / "a.gif", 5)] == [
        25 * i for i in sample_frame_indices(10, 5)
    ]
    assert [f.getpixel((0, 0))[0] for f in read_frames(tmp_path / "a.gif", 1, start=0.2, end=0.21)] == [25 * 4]


def test_arrays_tensors_and_lists():
    array = np.random.default_rng(0).integers(0, 256, (11, 6, 10, 3), dtype=np.uint8)
    expected = array[sample_frame_indices(11, 4)]
    images = [Image.fromarray(frame) for frame in array]
    for source in (array, torch.from_numpy(array), images, list(array)):
        np.testing.assert_array_equal(pixels(read_frames(source, 4)), expected)
    padded = read_frames(images[:2], 3)
    assert padded[2].size == (6, 10) and padded[2].getextrema() == ((0, 0),) * 3


def test_image_is_rgb_and_upright(tmp_path):
    image = Image.new("RGB", (8, 4), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("L", (8, 4), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    assert read_image(np.full((2, 3, 3), 9, np.uint8)).size == (3, 2)
    assert read_image(Image.new("RGBA", (2, 2))).mode == "RGB"


# ------------------------------------------------------------------------------------------------------------- audio


def test_range_cuts_time(golden):
    path = golden / "media" / "m1_chirp.mp4"
    whole = read_waveform(path)
    np.testing.assert_array_equal(read_waveform(path, start=0.5, end=1.5), whole[8000:24000])
    np.testing.assert_array_equal(read_waveform(path, start=2.5), whole[40000:])
    np.testing.assert_array_equal(read_waveform(path, end=1), whole[:16000])
    np.testing.assert_array_equal(read_waveform(path, start=0.25, max_seconds=0.5), whole[4000:12000])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("surround.wav", ("-ac", "6")),
        ("surround.m4a", ("-ac", "6", "-c:a", "aac")),
        ("telephone.wav", ("-ar", "8000", "-ac", "1")),
        ("studio.m4a", ("-ar", "48000", "-c:a", "aac")),
        ("bytes.wav", ("-c:a", "pcm_u8")),
        ("floats.wav", ("-c:a", "pcm_f32le")),
        ("clip.mp3", ("-c:a", "libmp3lame")),
        ("clip.webm", ("-c:a", "libopus")),
        ("clip.mov", ("-c:a", "pcm_s16le")),
    ],
)
def test_sound_formats_agree_with_ffmpeg(tmp_path, name, options):
    path = make.make_sound(tmp_path / name, *options)
    wave, expected = read_waveform(path), make.decode_sound(path)
    assert abs(len(wave) - len(expected)) < 0.06 * 16000
    spectrum = lambda x: np.abs(np.fft.rfft(x[:30000] * np.hanning(30000))).reshape(-1)[:9000].reshape(-1, 60).sum(1)  # noqa: E731
    ours, theirs = spectrum(wave), spectrum(expected)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.98
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.1)


def test_sound_only_pyav_can_read(tmp_path, caplog):
    path = make.make_sound(tmp_path / "clip.dfpwm", "-ac", "1")
    wave, expected = read_waveform(path), make.decode_sound(path)
    assert "clip.dfpwm" in caplog.text and "PyAV" in caplog.text
    np.testing.assert_allclose(wave[: len(expected)], expected, atol=2e-4)


def test_nan_samples_become_a_number():
    wave = read_waveform(np.array([0.5, np.nan, -0.5]))
    assert wave.tolist() == [0.5, -1.5, -0.5] and wave.dtype == np.float32


def test_nan_in_a_file(tmp_path):
    raw = np.array([0.25] * 400 + [np.nan] * 400 + [0.25] * 400, "<f4").tofile(tmp_path / "raw")
    assert raw is None
    make.ffmpeg(
        "-f", "f32le", "-ar", "16000", "-ac", "1", "-i", tmp_path / "raw", "-c:a", "pcm_f32le", tmp_path / "n.wav"
    )
    wave = read_waveform(tmp_path / "n.wav")
    assert np.isfinite(wave).all() and (wave == -1.5).any()


def test_no_audio_stream_is_silence(tmp_path, caplog):
    path = make.make_video(tmp_path / "mute.mp4")
    with caplog.at_level(logging.INFO, "humanomni.media"):
        wave = read_waveform(path)
    assert wave.shape == (160000,) and not wave.any()
    assert "mute.mp4" in caplog.text and caplog.records[0].levelno == logging.INFO


def test_wav_written_to_a_pipe(tmp_path):
    path = tmp_path / "pipe.wav"
    with path.open("wb") as file:
        subprocess.run(
            [make.FFMPEG, "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-f", "wav", "-"], stdout=file, check=True
        )
    assert abs(len(read_waveform(path)) - 16000) <= 16


# Without noise substitution: what AAC decoders put into such bands is random, and depends on all packets before.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", ("-c:a", "aac", "-aac_pns", "0")),
        ("b.wav", ()),
        ("c.mkv", ("-c:a", "aac")),
        ("d.mp3", ("-c:a", "libmp3lame")),
    ],
)
def test_long_sound_equals_a_full_read(tmp_path, name, options):
    path = make.make_sound(tmp_path / name, *options, seconds=80)
    whole = decord.AudioReader(str(path), sample_rate=16000)[:].asnumpy()[0]
    for start, end in ((None, None), (5, 9), (30.5, None), (65.3, 70), (75, None)):
        expected = whole[int((start or 0) * 16000) : None if end is None else end * 16000][: 30 * 16000]
        np.testing.assert_array_equal(read_waveform(path, start=start, end=end), expected)
    refuses(lambda: read_waveform(path, start=99), name, "start=99", "80.")


@pytest.mark.slow
def test_two_hours_take_little_memory(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to reset the peak of the memory in use")
    piece = make.make_video(tmp_path / "piece.mp4", "-g", "10", "-b:a", "16k", fps=1, seconds=60, audio=True)
    path = tmp_path / "long.mp4"
    make.ffmpeg("-stream_loop", "119", "-i", piece, "-c", "copy", path)
    script = f"""
        import re
        import numpy as np
        from pathlib import Path
        from humanomni import media
        field = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        media.read_frames({str(piece)!r}, 8), media.read_waveform({str(piece)!r}, end=3)
        Path("/proc/self/clear_refs").write_text("5")
        before = field("VmRSS")
        frames = media.read_frames({str(path)!r}, 8)
        by_pyav = media._frames_by_pyav(Path({str(path)!r}), lambda n, fps: media.sample_frame_indices(n, 8))
        assert all((np.asarray(a) == b).all() for a, b in zip(frames, by_pyav, strict=True))
        assert len(media.read_waveform({str(path)!r})) == 480000
        assert len(media.read_waveform({str(path)!r}, start=5000, end=5020)) == 320000
        print(field("VmHWM") - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    # All of its sound would be 440 MB.
    assert float(done.stdout) < 40


# ------------------------------------------------------------------------------------------------------------ errors


def refuses(call, *words: str) -> None:
    with pytest.raises(MediaError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message


def test_files_that_are_not_media(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no film\n" * 50)
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "image.mp4").write_bytes((tmp_path / "image.png").read_bytes())
    (tmp_path / "text.gif").write_text("no GIF")
    for read in (lambda p: read_frames(p, 8), read_waveform, media.has_video_stream, media.has_audio_stream):
        refuses(lambda: read(tmp_path / "missing.mp4"), "missing.mp4", "does not exist")  # noqa: B023
        refuses(lambda: read(tmp_path / "empty.mp4"), "empty.mp4", "is empty")  # noqa: B023
        refuses(lambda: read(tmp_path / "text.mp4"), "text.mp4")  # noqa: B023
        refuses(lambda: read(tmp_path / "image.mp4"), "image.mp4", "is an image")  # noqa: B023
    refuses(lambda: read_frames(tmp_path / "folder", 8), "folder", "without frame images")
    refuses(lambda: read_waveform(tmp_path / "folder"), "folder", "is a folder")
    refuses(lambda: read_frames(tmp_path / "image.png", 8), "image.png", "--modal image")
    refuses(lambda: read_frames(tmp_path / "text.gif", 8), "text.gif", "GIF")
    refuses(lambda: read_image(tmp_path / "text.mp4"), "text.mp4", "not a readable image")
    read_frames(EXAMPLE, 1)[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    refuses(lambda: read_image(tmp_path / "cut.png"), "cut.png", "not a readable image")


def test_probes_and_missing_streams(tmp_path):
    sound = make.make_sound(tmp_path / "sound.wav")
    film = make.make_video(tmp_path / "film.mp4", audio=True)
    mute = make.make_video(tmp_path / "mute.mp4")
    probes = [(media.has_video_stream(p), media.has_audio_stream(p)) for p in (sound, film, mute)]
    assert probes == [(False, True), (True, True), (True, False)]
    refuses(lambda: read_frames(sound, 8), "sound.wav", "has no video stream; use --modal audio")
    make.ffmpeg("-i", sound, "-i", mute, "-map", "0:a", "-map", "1:v", "-frames:v", "1", "-c:v", "png",
                "-disposition:v", "attached_pic", tmp_path / "cover.mp3")  # fmt: skip
    assert not media.has_video_stream(tmp_path / "cover.mp3")


def test_ranges_outside_of_a_clip(tmp_path):
    film = make.make_video(tmp_path / "film.mp4", audio=True, seconds=2)
    for read in (lambda **k: read_frames(film, 8, **k), lambda **k: read_waveform(film, **k)):
        refuses(lambda: read(start=9), "film.mp4", "start=9", "2.0")  # noqa: B023
        refuses(lambda: read(start=-1), "film.mp4", "start=-1")  # noqa: B023
        refuses(lambda: read(start=1, end=0.5), "film.mp4", "end=0.5")  # noqa: B023


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3)),
        np.zeros((0, 4, 4, 3), np.uint8),
        [],
        [np.zeros((4, 4), np.uint8)],
    ],
)
def test_arrays_of_other_shapes_and_types(array):
    refuses(lambda: read_frames(array, 2))


def test_more_refusals(tmp_path):
    refuses(lambda: read_frames(np.zeros((2, 4, 4, 3), np.uint8), 2, start=1), "frame rate")
    refuses(lambda: read_frames(EXAMPLE, 0), "num_frames=0")
    refuses(lambda: read_waveform(np.zeros((2, 100))), "1-D")
    refuses(lambda: read_waveform(np.zeros(100, np.int16)), "int16")
    refuses(lambda: read_image(np.zeros((4, 4, 3))), "uint8")


def test_cut_files_are_named(tmp_path):
    whole = make.make_video(tmp_path / "w.mp4", "-movflags", "+faststart", audio=True, seconds=4).read_bytes()
    for part in (0.01, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut{part}.mp4"
        path.write_bytes(whole[: int(part * len(whole))])
        refuses(lambda: read_frames(path, 8), path.name)  # noqa: B023
        refuses(lambda: read_waveform(path), path.name)  # noqa: B023


def test_damaged_sound_is_not_cut_silently(tmp_path):
    """decord stops at a bad AAC packet and returns what it has."""
    data = bytearray(make.make_sound(tmp_path / "w.m4a", "-c:a", "aac", seconds=8).read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 3
    data[middle : middle + 400] = b"\xff" * 400
    (tmp_path / "bad.m4a").write_bytes(data)
    refuses(lambda: read_waveform(tmp_path / "bad.m4a"), "bad.m4a")


@pytest.mark.slow
def test_random_damage_never_crashes(tmp_path):
    """Each damaged file gives its full result or one MediaError; a crash, a hang or a bug ends the process below."""
    clean = make.make_video(tmp_path / "c.mp4", "-movflags", "+faststart", audio=True, seconds=2).read_bytes()
    rng = random.Random(0)
    head = clean.index(b"mdat")
    for i in range(60):
        where = head if i % 2 else len(clean)  # half of them hit the index
        flips = [rng.randrange(8 * where) for _ in range(rng.choice([1, 4, 16]))]
        (tmp_path / f"flip{i:02}.mp4").write_bytes(make.flip_bits(clean, flips))
    script = f"""
        from pathlib import Path
        from humanomni import media
        for path in sorted(Path({str(tmp_path)!r}).glob("flip*.mp4")):
            for read in (lambda p: media.read_frames(p, 8), media.read_waveform):
                try:
                    assert len(read(path)) >= 8
                except media.MediaError as error:
                    assert str(path) in str(error) and "\\n" not in str(error), error
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
