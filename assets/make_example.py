"""Draws assets/example.mp4: a talking face (Pillow) with a synthetic voice (espeak-ng), about 3.5 s, H.264 and AAC.

Run from anywhere with `espeak-ng` on the PATH: `python assets/make_example.py [output.mp4]`.
"""

import math
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw

SIZE, FPS, SCALE = 224, 25, 4  # pixels, frames per second, supersampling
TEXT = "I got the job! I can hardly believe it, this is wonderful!"


def speak(path: Path) -> np.ndarray:
    """Writes the spoken text to a WAV file; returns its loudness per video frame, 0 to 1."""
    subprocess.run(["espeak-ng", "-v", "en-us+f3", "-s", "165", "-p", "65", "-w", str(path), TEXT], check=True)
    with wave.open(str(path)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(float)
        step = sound.getframerate() // FPS
    frames = samples[: len(samples) // step * step].reshape(-1, step)
    loudness = np.sqrt((frames**2).mean(axis=1))
    return np.convolve(loudness / loudness.max(), [0.25, 0.5, 0.25], mode="same")


def draw(index: int, mouth: float) -> Image.Image:
    """One frame of a happy face whose head sways, whose eyes blink, and whose mouth opens by `mouth` (0 to 1)."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), (178, 205, 222))
    pen = ImageDraw.Draw(image)
    dx, dy = 7 * math.sin(index / 9), 3 * math.sin(index / 5)

    def ellipse(x: float, y: float, rx: float, ry: float, fill) -> None:
        box = [x + dx - rx, y + dy - ry, x + dx + rx, y + dy + ry]
        pen.ellipse([SCALE * v for v in box], fill=fill)

    def arc(x: float, y: float, rx: float, ry: float, start: int, end: int, width: float, fill) -> None:
        box = [x + dx - rx, y + dy - ry, x + dx + rx, y + dy + ry]
        pen.arc([SCALE * v for v in box], start, end, fill=fill, width=round(SCALE * width))

    pen.ellipse([SCALE * v for v in (32, 178, 192, 330)], fill=(64, 104, 150))  # shoulders
    pen.rectangle([SCALE * v for v in (96 + dx / 2, 160, 128 + dx / 2, 196)], fill=(214, 166, 134))  # neck
    ellipse(112, 92, 66, 72, (74, 48, 36))  # hair
    ellipse(112, 108, 54, 66, (236, 190, 158))  # face
    ellipse(112, 52, 50, 22, (74, 48, 36))  # fringe
    for side in (-1, 1):
        x = 112 + 22 * side
        ellipse(x + 13 * side, 126, 11, 7, (240, 164, 146))  # cheek
        arc(x, 84, 13, 9, 200, 340, 3, (74, 48, 36))  # raised brow
        if index % 45 in (20, 21, 22):
            arc(x, 98, 10, 6, 10, 170, 2.5, (60, 40, 32))  # blink
        else:
            ellipse(x, 98, 10, 8, (255, 255, 255))
            ellipse(x + dx / 4, 98, 5, 5.5, (70, 92, 60))
            ellipse(x + dx / 4, 98, 2.4, 2.6, (16, 16, 16))
    arc(112, 112, 6, 8, 20, 160, 2.5, (196, 140, 112))  # nose
    height = 3 + 17 * mouth
    arc(112, 134, 25, 14, 15, 165, 3, (160, 58, 62))  # smile
    ellipse(112, 144, 17, height, (120, 30, 38))
    if mouth > 0.15:
        ellipse(112, 144 - height * 0.62, 12, height * 0.25, (250, 250, 246))  # teeth
        ellipse(112, 144 + height * 0.5, 9, height * 0.35, (208, 96, 100))  # tongue
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "voice.wav"
        mouths = speak(sound)
        pixels = b"".join(draw(i, float(mouth)).tobytes() for i, mouth in enumerate(mouths))
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", str(FPS), "-i", "-"]
        command += ["-i", str(sound), "-c:v", "libx264", "-crf", "26", "-preset", "veryslow", "-pix_fmt", "yuv420p"]
        command += ["-c:a", "aac", "-b:a", "64k", "-ar", "44100", "-shortest", "-movflags", "+faststart", str(output)]
        subprocess.run(command, input=pixels, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("example.mp4"))
