"""Makes small clips for tests: ffmpeg (imageio-ffmpeg's binary) encodes, raw pipes and `wave` give the references."""

import functools
import subprocess
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@functools.cache
def has_encoder(name: str) -> bool:
    listing = subprocess.run([FFMPEG, "-hide_banner", "-encoders"], capture_output=True, text=True, check=True).stdout
    return f" {name} " in listing


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def make_video(
    path: Path,
    *options: str,
    size: tuple[int, int] = (64, 48),
    fps: int = 10,
    seconds: float = 1.2,
    codec: str = "libx264",
    audio: bool = False,
) -> Path:
    """A moving test picture of `size` (width, height), with a 440 Hz tone if `audio`; `options` go to the output."""
    width, height = size
    inputs = ["-f", "lavfi", "-i", f"testsrc2=s={width}x{height}:r={fps}:d={seconds}"]
    sound = ["-f", "lavfi", "-i", f"sine=f=440:d={seconds}:r=44100", "-c:a", "aac"] if audio else []
    picture = ["-c:v", codec, "-frames:v", str(round(fps * seconds)), "-pix_fmt", "yuv420p"]
    ffmpeg(*inputs, *sound, *picture, *options, path)
    return path


def make_sound(path: Path, *options: str, seconds: float = 2.0, rate: int = 44100) -> Path:
    """A stereo chirp over noise: no two of its seconds are alike."""
    left, right = "0.4*sin(2*PI*t*(200+7*t))+0.1*sin(6000*t)", "0.3*sin(2*PI*300*t)+0.1*random(0)"
    ffmpeg("-f", "lavfi", "-i", f"aevalsrc={left}|{right}:d={seconds}:s={rate}", *options, path)
    return path


def decode_frames(path: Path, size: tuple[int, int]) -> np.ndarray:
    """All shown frames as ffmpeg's command line decodes and turns them: (T, H, W, 3) uint8."""
    command = [FFMPEG, "-v", "error", "-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, size[1], size[0], 3)


def decode_sound(path: Path, rate: int = 16000) -> np.ndarray:
    """The sound as ffmpeg's command line mixes and resamples it: (samples,) float32."""
    command = [FFMPEG, "-v", "error", "-i", str(path), "-ac", "1", "-ar", str(rate), "-f", "f32le", "-"]
    return np.frombuffer(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout, np.float32)


def write_wave(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """16-bit WAV of floats in [-1, 1]: (samples,) mono or (samples, channels)."""
    samples = samples.reshape(len(samples), -1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return path


def flip_bits(data: bytes, positions: list[int]) -> bytes:
    """`data` with one bit inverted at each of the given bit positions."""
    flipped = bytearray(data)
    for position in positions:
        flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)
