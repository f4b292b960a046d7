"""Draws the face of a clip: frames whose mouth, lips, brows, eyes and head motion are the scene's cues.

Lengths are in units of the face's radius; the face's middle is (0, 0), y points down.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, height and width
FRAMES_PER_SECOND = 4
SUPERSAMPLING = 3
SWING = 0.16  # of a nodding or shaking head


@dataclass(frozen=True)
class FaceStyle:
    """What differs between the faces of a world besides their cues; pairs are ranges to draw from.

    Attributes:
        skins, backgrounds: RGB colours to start from, in 0..255.
        roundness: exponent of the outline, 2 an ellipse, more a rounder square.
        radius: of the face, as a share of half the picture.
        offset: how far the face may be from the middle, as a share of half the picture.
        stroke: width of drawn lines.
        noise: standard deviation of the pixels, of 255.
        jitter: standard deviation of a cue around its level, in levels.
    """

    skins: tuple[tuple[int, int, int], ...]
    backgrounds: tuple[tuple[int, int, int], ...]
    roundness: tuple[float, float]
    radius: tuple[float, float]
    offset: float
    stroke: tuple[float, float]
    noise: tuple[float, float]
    jitter: float


def draw_face(levels: tuple[int, ...], style: FaceStyle, seconds: float, random: np.random.Generator) -> np.ndarray:
    """The frames of a clip, (seconds * FRAMES_PER_SECOND, SIZE, SIZE, 3), uint8.

    Args:
        levels: of mouth, lips, brows, eyes and head, see `open_r1.mini.cues.PICTURE_CUES`.
    """
    mouth, lips, brows, eyes = (
        level - 1 + style.jitter * float(np.clip(random.normal(), -2, 2)) for level in levels[:4]
    )
    head = levels[4]
    skin = _near(style.skins[random.integers(len(style.skins))], 20, random)
    background = _near(style.backgrounds[random.integers(len(style.backgrounds))], 36, random)
    ink, lip = _near((20, 18, 22), 18, random), _near((176, 44, 46), 30, random)
    half = SIZE * SUPERSAMPLING / 2
    radius = random.uniform(*style.radius) * half
    x0, y0 = half + random.uniform(-1, 1, 2) * style.offset * half
    roundness, aspect = random.uniform(*style.roundness), random.uniform(0.82, 1.0)
    stroke, noise = random.uniform(*style.stroke) * radius, random.uniform(*style.noise)
    cycles, phase = random.uniform(1.2, 2.0), random.uniform(0, 2 * math.pi)
    swing = SWING * random.uniform(0.8, 1.2)

    outline = _outline(roundness, aspect)
    frames = []
    for index in range(round(seconds * FRAMES_PER_SECOND)):
        time = index / (seconds * FRAMES_PER_SECOND)
        sway = swing * math.sin(2 * math.pi * cycles * time + phase)
        drift = 0.015 * math.sin(2 * math.pi * time + phase)
        dx = (sway if head == 2 else 0.0) + drift
        dy = sway if head == 1 else 0.0
        image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, background)
        pen = _Pen(ImageDraw.Draw(image), x0 + dx * radius, y0 + dy * radius, radius)
        pen.polygon(outline, skin)
        for side in (-1, 1):
            _draw_eye(pen, side, eyes, ink)
            _draw_brow(pen, side, brows, ink, stroke)
        _draw_mouth(pen, mouth, lips, ink, lip, stroke)
        frames.append(np.asarray(image.reduce(SUPERSAMPLING), np.float32))
    grain = random.standard_normal((len(frames), SIZE, SIZE, 1), np.float32) * np.float32(noise * 255)
    return (np.stack(frames) + grain).clip(0, 255).astype(np.uint8)


class _Pen:
    """Draws in units of the face."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float, radius: float):
        self.draw, self.x, self.y, self.radius = draw, x, y, radius

    def _place(self, points) -> list[tuple[float, float]]:
        return [(self.x + x * self.radius, self.y + y * self.radius) for x, y in points]

    def polygon(self, points, colour) -> None:
        self.draw.polygon(self._place(points), fill=colour)

    def line(self, points, colour, width: float) -> None:
        self.draw.line(self._place(points), fill=colour, width=max(1, round(width)), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour) -> None:
        self.draw.ellipse(sum(self._place([(x - rx, y - ry), (x + rx, y + ry)]), ()), fill=colour)


def _near(colour: tuple[int, int, int], spread: int, random: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(np.clip(value + random.integers(-spread, spread + 1), 0, 255)) for value in colour)


def _outline(roundness: float, aspect: float) -> list[tuple[float, float]]:
    """A superellipse."""
    points = []
    for step in range(48):
        angle = 2 * math.pi * step / 48
        c, s = math.cos(angle), math.sin(angle)
        points.append(
            (aspect * math.copysign(abs(c) ** (2 / roundness), c), math.copysign(abs(s) ** (2 / roundness), s))
        )
    return points


def _draw_eye(pen: _Pen, side: int, opening: float, ink) -> None:
    height = 0.15 + 0.075 * max(opening, -1.3)  # from a slit to a circle
    pen.ellipse(side * 0.36, -0.18, 0.19, height, (250, 250, 250))
    pen.ellipse(side * 0.36, -0.18, min(0.075, height), min(0.085, height), ink)


def _draw_brow(pen: _Pen, side: int, lift: float, ink, stroke: float) -> None:
    middle, slope = -0.5 - 0.08 * lift, 0.1 * lift  # raised: high with the inner end up; lowered: the inner end down
    pen.line([(side * 0.16, middle - slope), (side * 0.56, middle + slope)], ink, stroke)


def _draw_mouth(pen: _Pen, smile: float, opening: float, ink, lip, stroke: float) -> None:
    xs = [step / 8 for step in range(-8, 9)]
    middle = [0.48 + 0.26 * smile * (0.5 - x * x) for x in xs]
    gape = [0.14 * max(opening + 1, 0.0) * (1 - x * x) for x in xs]
    thickness = stroke / pen.radius

    def band(extra: float) -> list[tuple[float, float]]:
        upper = [(0.42 * x, y - g - extra) for x, y, g in zip(xs, middle, gape, strict=True)]
        lower = [(0.42 * x, y + g + extra) for x, y, g in zip(xs, middle, gape, strict=True)]
        return upper + lower[::-1]

    pen.polygon(band(thickness), lip)
    if max(gape) > 0.05:
        pen.polygon(band(0.0), ink)
