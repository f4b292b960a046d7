"""Turns clips on disk and arrays in memory into the model's raw material: T RGB frames and one mono waveform.

decord reads first: the released weights were trained on the artefacts of its audio resampler. PyAV opens every file
before decord does, because decord aborts the process on some damaged headers, and is the second reader where decord
fails or is known to be wrong. The reasons stand beside the rules below.

Shapes: T frames, H height, W width.
"""

import bisect
import io
import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import av.error
import decord
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image, ImageOps

from humanomni.errors import MediaError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp", ".gif"}
)
AUDIO_SUFFIXES = frozenset({".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".wma"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})

FOLDER_FPS = 3.0
GIF_FPS = 25.0
SILENCE_SECONDS = 10  # what the release feeds for a clip without sound
NAN_SAMPLE = -1.5
LONG_AUDIO_SECONDS = 60  # decord decodes a whole file at once: longer ones are cut first
_LEAD_SECONDS = 12  # holds a packet that begins on a sample: 1024 at 44.1 kHz and 16 kHz meet every 10.24 s
_HEAD_SECONDS = 600  # 600 s of mono floats at 16 kHz are 38 MB
_EXACT_TIMES = frozenset({"mov", "wav", "flac", "avi"})
_LOST_SECONDS = 0.25  # less than this missing at the end of a sound is a matter of priming and padding

# Where decord's seeking returns the right frames (measured). H.264 in AVI comes back up to 20 s off, MPEG-4 with
# B-frames 2 frames off, HEVC with open GOPs up to 4 frames off; MPEG-TS and MPEG-PS fail at the end.
_DECORD_CODECS = frozenset({"h264", "vp8", "vp9"})
_DECORD_CONTAINERS = frozenset({"mov", "matroska", "flv"})
# Any frame that decord had to make up from its neighbours is an error, not a frame.
_NO_RECOVERED_FRAMES = 1e-6
_MUXERS = frozenset({"mp4", "matroska", "mp3", "wav", "flac", "ogg", "avi", "flv", "mpegts", "adts", "asf"})
_DECORD_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError)

_NO_FRAME = "has a video stream without a readable frame; re-encode or replace it"

Chooser = Callable[[int, float], np.ndarray]  # (frames in the clip, frames per second) -> indices to read

logger = logging.getLogger(__name__)
decord.logging.set_level(decord.logging.QUIET)


# ---------------------------------------------------------------------------------------------------------- sampling


def sample_frame_indices(num_available: int, num_frames: int) -> np.ndarray:
    """Middles of `num_frames` equal segments of a clip, rounded to the nearest frame (ties to even).

    Returns int64 (num_frames,), non-decreasing, within [0, num_available - 1]. Raises MediaError below one frame.
    """
    if num_available < 1 or num_frames < 1:
        raise MediaError(f"cannot sample {num_frames} of {num_available} frames; both must be at least 1")
    segment = (num_available - 1) / num_frames
    return np.round((np.arange(num_frames) + 0.5) * segment + 1e-6).astype(np.int64)


def frame_range(num_available: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame (inclusive) of the seconds [start, end]; None stands for the clip's own border.

    Raises MediaError, naming the clip's length, for a range that is negative, backward, empty or beyond the clip.
    """
    _check_seconds(start, end, num_available / fps)
    first = 0 if start is None else max(int(start * fps) - 1, 0)
    last = num_available - 1 if end is None else min(int(end * fps) - 1, num_available - 1)
    if last < first:
        raise MediaError(
            f"the range from start={start} to end={end} seconds holds no frame of this clip of "
            f"{num_available / fps:.2f} seconds at {fps:g} frames per second; widen it"
        )
    return first, last


def _check_seconds(start: float | None, end: float | None, length: float | None) -> None:
    """`length` is None where it is not known yet."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not 0 <= value < math.inf:
            raise MediaError(f"{name}={value} is not a time in a clip; give seconds from 0 on")
    if start is not None and end is not None and end <= start:
        raise MediaError(f"end={end} is not after start={start}{_length_note(length)}; give start < end in seconds")
    if start is not None and length is not None and start >= length:
        raise MediaError(f"start={start} is beyond the end{_length_note(length)}; give a smaller start in seconds")


def _length_note(length: float | None) -> str:
    return "" if length is None else f" (the clip lasts {length:.2f} seconds)"


# ------------------------------------------------------------------------------------------------------------ frames


def read_frames(source, num_frames: int, *, start: float | None = None, end: float | None = None) -> list[Image.Image]:
    """Uniformly sampled RGB frames, always `num_frames` of them, upright.

    `source` is the path of a video file, a GIF or a folder of frame images, a (T, H, W, 3) uint8 array or tensor, or a
    list of images. `start` and `end` are seconds. Raises MediaError, naming the source, when nothing can be read.
    """
    if num_frames < 1:
        raise MediaError(f"num_frames={num_frames} asks for no frame; give at least 1")
    if not isinstance(source, (str, os.PathLike)):
        if start is not None or end is not None:
            raise MediaError("start and end need a clip with a frame rate, not an array; cut the array instead")
        return _frames_of_sequence(source, num_frames)

    def choose(num_available: int, fps: float) -> np.ndarray:
        first, last = frame_range(num_available, fps, start, end)
        return first + sample_frame_indices(last - first + 1, num_frames)

    path = Path(source)
    if path.is_dir():
        return _frames_of_folder(path, choose)
    with _naming(path):
        _check_file(path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise MediaError("is an image, not a video; use --modal image")
        if path.suffix.lower() == ".gif":
            return _frames_of_gif(path, choose)
        return [Image.fromarray(frame) for frame in _frames_of_video(path, choose)]


def read_image(source) -> Image.Image:
    """RGB image of a path, a PIL image or a (H, W, 3) uint8 array, turned upright by its EXIF orientation."""
    if not isinstance(source, (str, os.PathLike)):
        return _to_rgb(source)
    path = Path(source)
    with _naming(path):
        _check_file(path)
        try:
            with Image.open(path) as image:
                return _to_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"is not a readable image ({_brief(error)}); give a complete PNG or JPEG file") from error


def _to_rgb(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise MediaError(f"an image array must be (H, W, 3) uint8, not {array.shape} {array.dtype}; convert it")
    return Image.fromarray(array)


def _frames_of_sequence(source, num_frames: int) -> list[Image.Image]:
    if not isinstance(source, (list, tuple)):
        source = np.asarray(source)
        if source.ndim != 4 or source.shape[3] != 3 or source.dtype != np.uint8:
            raise MediaError(
                f"a video array must be (T, H, W, 3) uint8, not {source.shape} {source.dtype}; convert it"
            )
    if len(source) == 0:
        raise MediaError("the video array or list of images is empty; give at least one frame")
    if len(source) > num_frames:
        return [_to_rgb(source[i]) for i in sample_frame_indices(len(source), num_frames)]
    frames = [_to_rgb(frame) for frame in source]
    while len(frames) < num_frames:
        # The release makes each black frame with the width and height of the one before it swapped, so they lie and
        # stand in turn; its tensors depend on it when frames are padded to squares.
        frames.append(Image.new("RGB", frames[-1].size[::-1]))
    return frames


def _frames_of_folder(folder: Path, choose: Chooser) -> list[Image.Image]:
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and not entry.name.startswith(".") and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
    )
    with _naming(folder):
        if not names:
            raise MediaError("is a folder without frame images; put one .png or .jpg file per frame into it")
        wanted = choose(len(names), FOLDER_FPS)
    return [read_image(folder / names[i]) for i in wanted]


def _frames_of_gif(path: Path, choose: Chooser) -> list[Image.Image]:
    frames = []
    try:
        with Image.open(path, formats=["GIF"]) as gif:
            for index in choose(gif.n_frames, GIF_FPS):
                gif.seek(int(index))
                frames.append(gif.convert("RGB"))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(f"is not a readable GIF ({_brief(error)}); give a complete GIF or a video file") from error
    return frames


def _frames_of_video(path: Path, choose: Chooser) -> list[np.ndarray]:
    reason = _why_not_decord(path)
    if reason is not None:
        logger.info("%s: frames read with PyAV, because %s", path, reason)
        return _frames_by_pyav(path, choose)
    try:
        return _frames_by_decord(path, choose)
    except _DECORD_ERRORS as error:
        frames = _frames_by_pyav(path, choose)
        logger.warning("%s: frames read with PyAV, because decord cannot (%s)", path, _brief(error))
        return frames


def _why_not_decord(path: Path) -> str | None:
    """The reason to read these frames with PyAV at once, or None; a file without a picture is a MediaError."""
    with _open(path) as container:
        stream = _video_stream(container)
        if stream.frames > path.stat().st_size:  # decord would allocate for them and abort the process
            raise MediaError(f"declares {stream.frames} frames in {path.stat().st_size} bytes: damaged; copy it again")
        codec = _codec_name(stream)
        if codec not in _DECORD_CODECS:
            return f"decord's seeking is not to be trusted with {codec}"
        if not _DECORD_CONTAINERS & set(container.format.name.split(",")):
            return f"decord's seeking is not to be trusted in {container.format.name} files"
        for packet in container.demux(stream):
            if packet.is_discard:
                return "its edit list hides the first frames"  # decord counts them, and shows another in their place
            if frames := packet.decode():
                frame = frames[0]
                break
        else:
            raise MediaError(_NO_FRAME)
        if SideData.DISPLAYMATRIX in frame.side_data:
            return "it is rotated"  # decord turns mirrored pictures the wrong way
        if _decord_mistakes_padding(frame.width):
            return f"decord cannot copy pictures {frame.width} pixels wide"
    return None


def _decord_mistakes_padding(width: int) -> bool:
    """Whether decord takes the padded rows of its RGB buffers for rows with more channels (16, 24, 48, 72, ...).

    Its ffmpeg pads the width to the smallest power of two up to 32 that makes rows a multiple of 32 bytes.
    """
    paddings = (-(-width // 2**k) * 2**k for k in range(6))
    row = next(3 * padded for padded in paddings if 3 * padded % 32 == 0)
    return row % width == 0 and row != 3 * width


def _frames_by_decord(path: Path, choose: Chooser) -> list[np.ndarray]:
    reader = decord.VideoReader(_location(path), num_threads=1, fault_tol=_NO_RECOVERED_FRAMES)
    return list(reader.get_batch(choose(len(reader), reader.get_avg_fps())).asnumpy())


def _frames_by_pyav(path: Path, choose: Chooser) -> list[np.ndarray]:
    with _open(path) as container:
        stream = _video_stream(container)
        rate = float(stream.average_rate or stream.guessed_rate or GIF_FPS)
        times, keys = _index_video(container, stream)
    wanted = choose(len(times), rate).tolist()
    frames = _seek_frames(path, wanted, times, keys) or _walk_frames(path, wanted, len(times))
    return [frames[index] for index in wanted]


def _index_video(container, stream) -> tuple[list, list]:
    """Sorted presentation times of the shown frames, and of the keyframes, from the packets alone.

    The second is empty where packets do not say when they are shown; such a clip can only be read from its start.
    """
    packets = [(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
    if any(corrupt for *_, corrupt in packets) or len(packets) < stream.frames:
        raise MediaError(f"is cut short: {len(packets)} of {stream.frames or '?'} frames are there; copy it again")
    shown = [(pts, key) for pts, key, discard, _ in packets if not discard]
    if not shown:
        raise MediaError(_NO_FRAME)
    # AVI has no presentation times: with B-frames, what stands for them is the decoding order.
    if any(pts is None for pts, _ in shown) or ("avi" in container.format.name and stream.codec_context.has_b_frames):
        return [None] * len(shown), []
    return sorted(pts for pts, _ in shown), sorted(pts for pts, key in shown if key)


def _seek_frames(path: Path, wanted: list[int], times: list, keys: list) -> dict[int, np.ndarray] | None:
    """Decodes from the keyframe before each wanted frame; None where the container's seeking does not lead there."""
    frames = {}
    with _open(path) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        decoded, position = container.decode(stream), -math.inf
        for index in sorted(set(wanted)):
            before = bisect.bisect_right(keys, times[index])
            if before == 0:
                return None
            if position < keys[before - 1]:
                container.seek(keys[before - 1], stream=stream)
                decoded = container.decode(stream)
            position = times[index]
            frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= position), None)
            if frame is None or frame.pts != position:
                return None
            frames[index] = _checked_pixels(frame, index)
    return frames


def _walk_frames(path: Path, wanted: list[int], num_available: int) -> dict[int, np.ndarray]:
    """Decodes the clip from its start, keeping only the wanted frames."""
    frames, pending = {}, set(wanted)
    with _open(path) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in pending:
                frames[index] = _checked_pixels(frame, index)
                pending.remove(index)
                if not pending:
                    return frames
    raise MediaError(f"is damaged or cut short: frame {min(pending)} of {num_available} does not decode; replace it")


def _checked_pixels(frame: av.VideoFrame, index: int) -> np.ndarray:
    if frame.is_corrupt:
        raise MediaError(f"is damaged: frame {index} decodes with errors; replace it")
    return _upright(frame)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB pixels (H, W, 3) after the quarter turns and mirrorings of the frame's display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    xx, xy, _, yx, yy = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = xx x + yx y, y' = xy x + yy y
    if abs(xy) > abs(xx):
        pixels, xx, yy = pixels.swapaxes(0, 1), yx, xy
    return np.ascontiguousarray(pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1])


# ------------------------------------------------------------------------------------------------------------- audio


def read_waveform(
    source,
    *,
    sampling_rate: int = 16000,
    max_seconds: float = 30.0,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Mono float32 waveform (samples,) at `sampling_rate`, cut to [start, end] seconds, then to `max_seconds`.

    `source` is the path of a video or audio file, or a 1-D float array already at `sampling_rate`. A file without an
    audio stream gives SILENCE_SECONDS of zeros, as the release does. Raises MediaError, naming the file, for an audio
    stream that does not decode, or a range outside of it.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        with _naming(path):
            _check_seconds(start, end, None)
            _check_file(path)
            wave = _waveform_of_file(path, sampling_rate, max_seconds, start, end)
    else:
        _check_seconds(start, end, None)
        wave = _cut_seconds(_checked_wave(source), 0, sampling_rate, start, end)
    wave = wave[: int(max_seconds * sampling_rate)].astype(np.float32)
    wave[np.isnan(wave)] = NAN_SAMPLE
    return wave


def _checked_wave(source) -> np.ndarray:
    wave = np.asarray(source)
    if wave.ndim != 1 or wave.dtype.kind != "f" or wave.size == 0:
        raise MediaError(f"a waveform must be a 1-D float array, not {wave.shape} {wave.dtype}; mix it to mono floats")
    return wave


def _cut_seconds(wave: np.ndarray, origin: int, rate: int, start: float | None, end: float | None) -> np.ndarray:
    """`wave`'s samples within [start, end] seconds; its first sample is number `origin` of the whole sound."""
    length = (origin + len(wave)) / rate
    _check_seconds(start, end, length)
    return wave[int((start or 0) * rate) - origin : None if end is None else max(int(end * rate) - origin, 0)]


def _waveform_of_file(path: Path, rate: int, max_seconds: float, start: float | None, end: float | None) -> np.ndarray:
    begin = start or 0.0
    stop = begin + max_seconds if end is None else min(end, begin + max_seconds)
    with _open(path) as container:
        streams = container.streams.audio
        if not streams:
            logger.info("%s: no audio stream; %d seconds of silence stand for it", path, SILENCE_SECONDS)
            return np.zeros(SILENCE_SECONDS * rate, np.float32)
        length = _audio_seconds(container, streams[0])
        if length is not None and length <= LONG_AUDIO_SECONDS:
            source, origin, expected = path, 0, _check_packets(container, streams[0])
        else:
            source, origin, expected = _copy_packets(container, streams[0], begin, stop, rate)
    return _cut_seconds(_decode_audio(path, source, rate, expected), origin, rate, start, end)


def _audio_seconds(container, stream) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _check_packets(container, stream) -> float:
    """Seconds of sound the stream's packets hold; MediaError where some are missing."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    # A QuickTime or MP4 index counts packets, except for PCM, where it counts samples.
    counted = "mov" in container.format.name and not _codec_name(stream).startswith("pcm")
    if counted and len(packets) < stream.frames:
        raise MediaError(f"is cut short: {len(packets)} of {stream.frames} audio packets are there; copy it again")
    return _held_seconds(container, stream, packets)


def _held_seconds(container, stream, packets: list[av.Packet]) -> float:
    if not packets:
        raise MediaError("has an audio stream without a packet; re-encode or replace it")
    if any(packet.is_corrupt for packet in packets) and not _is_streamed_wav(container):
        raise MediaError("is damaged or cut short: an audio packet is incomplete; copy it again")
    base = stream.start_time or 0
    shown = (p.duration or 0 for p in packets if p.pts is not None and p.pts >= base)
    return float(sum(shown) * stream.time_base)


def _is_streamed_wav(container) -> bool:
    """Whether this WAV was written to a pipe: its header states no size, so ffmpeg believes its end to be missing."""
    if container.format.name != "wav":
        return False
    with open(container.name, "rb") as file:
        return file.read(8)[4:] == b"\xff\xff\xff\xff"


def _copy_packets(container, stream, begin: float, stop: float, rate: int) -> tuple[io.BytesIO, int, float]:
    """The packets around [begin, stop] seconds in a small file of the same format, without decoding.

    Returns it with the number of its first sample in the whole sound and the seconds it holds. decord's samples depend
    on where packets begin between two samples of the new rate, so a copy without the head starts at a packet that
    begins on one: then MP4, WAV, FLAC and AVI give exactly the samples of a full read (AAC's noise bands apart, which
    decoders fill at random). Other formats round their times and come within 25 ms, so up to _HEAD_SECONDS they keep
    their head, which is exact too.
    """
    tick, base = stream.time_base, stream.start_time or 0
    name = container.format.name.split(",")[0]
    headless = begin > (_LEAD_SECONDS if name in _EXACT_TIMES else _HEAD_SECONDS)
    if headless:
        container.seek(base + int((begin - _LEAD_SECONDS) / tick), stream=stream)
    packets, times = [], []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.dts is not None:
            packets.append(packet)
            times.append((packet.pts - base) * tick)
            if times[-1] > stop + 1:
                break
    first = 0
    if headless:
        if not packets:
            length = _length_note(_audio_seconds(container, stream))
            raise MediaError(f"start={begin:g} is beyond the end{length}; give a smaller start in seconds")
        early = (i for i, time in enumerate(times) if time < begin - 0.5 and (time * rate).denominator == 1)
        first = max(early, default=0)
        packets, times = packets[first:], times[first:]
    held = _held_seconds(container, stream, packets)
    if not headless:
        return _mux(name, stream, packets), 0, held
    shift = packets[0].pts
    for packet in packets:
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
    # A new MP3 header would hide the first 1105 samples of a piece.
    return _mux("matroska" if name == "mp3" else name, stream, packets), round(times[0] * rate), held


def _mux(demuxer: str, template, packets: list[av.Packet]) -> io.BytesIO:
    name = {"mov": "mp4", "aac": "adts"}.get(demuxer, demuxer)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name if name in _MUXERS else "matroska") as output:
        stream = output.add_stream_from_template(template)
        for packet in packets:
            packet.stream = stream
            output.mux(packet)
    buffer.seek(0)
    return buffer


def _decode_audio(path: Path, source: Path | io.BytesIO, rate: int, expected: float) -> np.ndarray:
    """Mono samples of `source` (`path`, or a piece of it that should hold `expected` seconds)."""
    try:
        reader = decord.AudioReader(_location(source), sample_rate=rate, mono=True)
        wave = reader[:].asnumpy()[0]
        # decord stops at the first packet that does not decode, and only prints it.
        if len(wave) / rate >= expected - _LOST_SECONDS:
            return wave
        reason = f"it stops after {len(wave) / rate:.2f} of {expected:.2f} seconds"
    except _DECORD_ERRORS as error:
        reason = _brief(error)
    if source is not path:
        source.seek(0)
    wave = _audio_by_pyav(source, rate)
    if len(wave) / rate < expected - _LOST_SECONDS or len(wave) == 0:
        raise MediaError(f"has damaged sound: {len(wave) / rate:.2f} of {expected:.2f} seconds decode; replace it")
    logger.warning("%s: sound read with PyAV, because decord cannot (%s)", path, reason)
    return wave


def _audio_by_pyav(source: Path | io.BytesIO, rate: int) -> np.ndarray:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    chunks = [np.zeros(0, np.float32)]
    with _open(source) as container:
        for frame in chain(container.decode(audio=0), [None]):  # None drains the resampler
            chunks += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    return np.concatenate(chunks)


# -------------------------------------------------------------------------------------------------- files and probes


def has_video_stream(path) -> bool:
    """Whether a file holds moving pictures (a cover picture does not count). Raises MediaError if it does not open."""
    return _probe(path, lambda container: bool(_picture_streams(container)))


def has_audio_stream(path) -> bool:
    """Whether a file holds sound. Raises MediaError if it does not open."""
    return _probe(path, lambda container: bool(container.streams.audio))


def clip_seconds(path) -> float:
    """How long a file's container says it plays, in seconds; 0 where it does not say."""
    return _probe(path, lambda container: (container.duration or 0) / 1_000_000)  # ffmpeg's AV_TIME_BASE


def _probe(path, question: Callable[..., bool]) -> bool:
    path = Path(path)
    with _naming(path):
        _check_file(path)
        with _open(path) as container:
            return question(container)


def _codec_name(stream) -> str:
    if stream.codec_context is None:
        raise MediaError("has a stream of an unknown codec; re-encode or replace it")
    return stream.codec_context.name


def _picture_streams(container) -> list:
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _video_stream(container):
    streams = _picture_streams(container)
    if not streams:
        raise MediaError("has no video stream; use --modal audio")
    return streams[0]


def _location(source: Path | io.BytesIO) -> str | io.BytesIO:
    """What to give to the readers: ffmpeg takes a relative `a:b.mp4` for a protocol, but not an absolute path."""
    return str(source.absolute()) if isinstance(source, Path) else source


@contextmanager
def _open(source: Path | io.BytesIO):
    """An opened PyAV container; every failure of ffmpeg within the block becomes a MediaError."""
    try:
        with av.open(_location(source), metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise MediaError("is an image, not a video or a sound; use --modal image")
            if container.format.name == "tty":  # ffmpeg draws plain text as pictures
                raise MediaError("is a text, not a video or a sound; give a video or audio file")
            if not container.streams.video and not container.streams.audio:
                raise MediaError("has neither a video nor an audio stream; give a video or audio file")
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(f"does not decode ({error.strerror}); it is damaged or no media file, replace it") from error


@contextmanager
def _naming(path: Path):
    """Puts the path in front of the MediaErrors of the block."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({_brief(error)}); check the path and its permissions") from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise MediaError("is a folder; give a file")
    if not path.exists():
        raise MediaError("does not exist; check the path")
    if path.stat().st_size == 0:
        raise MediaError("is empty; copy or download it again")


def _brief(error: BaseException) -> str:
    """The first line of a library's message, without the source position that decord puts in front."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)[:200].strip()
