"""Makes the voice of a clip, whose pitch, contour, loudness, tempo and quality are the scene's cues.

Speech comes from espeak-ng where it is installed; else vowels are synthesised from harmonics under two formants.
"""

import math
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np

from humanomni.errors import HumanOmniError

RATE = 16000  # samples per second
PITCH = 180.0  # Hz, of a voice of medium pitch
OCTAVES_OF_PITCH, OCTAVES_OF_CONTOUR, OCTAVES_OF_TEMPO, OCTAVES_OF_LOUDNESS = 0.7, 0.7, 0.75, 1.7
LOUDNESS = 0.06  # root mean square of a moderate voice
VOICES = ("espeak", "vowels")
SENTENCES = (
    "I will be there at nine",
    "They have put it on the table",
    "We are going to the station",
    "The letter came this morning",
    "You said it would be ready",
    "It is standing by the door",
)
# espeak-ng: f0 of a variant at -p 50 in Hz, and octaves one step of -p makes (both measured with a flat range)
ESPEAK_PITCH = {"f1": 182.0, "f2": 174.0, "f3": 182.0, "f4": 182.0, "f5": 182.0}
ESPEAK_OCTAVES_PER_STEP = 0.0155
ESPEAK_WORDS_PER_MINUTE = 175


@dataclass(frozen=True)
class VoiceStyle:
    """What differs between the voices of a world besides their cues; pairs are ranges to draw from.

    Attributes:
        variants: of espeak-ng's English voice.
        pitch: factor of the voice's pitch.
        formants: factor of the formants of a synthesised vowel.
        noise: root mean square of the background.
        jitter: standard deviation of a cue around its level, in levels.
    """

    variants: tuple[str, ...]
    pitch: tuple[float, float]
    formants: tuple[float, float]
    noise: tuple[float, float]
    jitter: float


def installed_voice() -> str:
    """`espeak` where espeak-ng is installed, else `vowels`."""
    return "espeak" if shutil.which("espeak-ng") else "vowels"


def make_voice(
    levels: tuple[int, ...], style: VoiceStyle, seconds: float, random: np.random.Generator, voice: str
) -> np.ndarray:
    """The sound of a clip, (seconds * RATE,), float32 in -1..1.

    Args:
        levels: of pitch, contour, loudness, tempo and quality, see `open_r1.mini.cues.SOUND_CUES`.
        voice: one of `VOICES`.
    """
    pitch, contour, loudness, tempo = (
        level - 1 + style.jitter * float(np.clip(random.normal(), -2, 2)) for level in levels[:4]
    )
    samples = round(seconds * RATE)
    hertz = PITCH * random.uniform(*style.pitch) * 2 ** (OCTAVES_OF_PITCH * pitch)
    speed = 2 ** (OCTAVES_OF_TEMPO * tempo)
    make = {"espeak": _speak, "vowels": _sing}[voice]
    sound = make(hertz, speed, style, samples, random)
    sound = _glide(sound, OCTAVES_OF_CONTOUR * contour)
    sound = sound / np.sqrt(np.mean(sound**2) + 1e-12)
    sound = _with_quality(sound, levels[4], random)
    sound = sound * LOUDNESS * 2 ** (OCTAVES_OF_LOUDNESS * loudness)
    sound = sound + random.normal(0, random.uniform(*style.noise), samples)
    return sound.clip(-1, 1).astype(np.float32)


def _speak(hertz: float, speed: float, style: VoiceStyle, samples: int, random: np.random.Generator) -> np.ndarray:
    """A sentence of espeak-ng in a flat tone, said again until the clip is full."""
    variant = style.variants[random.integers(len(style.variants))]
    sentence = SENTENCES[random.integers(len(SENTENCES))]
    step = 50 + math.log2(hertz / ESPEAK_PITCH[variant]) / ESPEAK_OCTAVES_PER_STEP
    command = ["espeak-ng", "-v", f"en-us+{variant}", "-p", str(round(np.clip(step, 0, 99)))]
    command += ["-s", str(round(ESPEAK_WORDS_PER_MINUTE * speed)), "-m", "--stdout"]
    spoken = subprocess.run([*command, f'<prosody range="x-low">{sentence}</prosody>'], capture_output=True)
    if spoken.returncode or len(spoken.stdout) <= 44:
        raise HumanOmniError(f"espeak-ng failed ({spoken.stderr.decode().strip()}); pass --voice vowels")
    rate = int.from_bytes(spoken.stdout[24:28], "little")
    said = np.frombuffer(spoken.stdout[44:], np.int16).astype(np.float32)  # a WAV header takes 44 bytes
    loud = np.flatnonzero(np.abs(said) > 0.02 * np.abs(said).max())
    said = said[loud[0] : loud[-1] + 1]
    said = np.interp(np.arange(0, len(said) - 1, rate / RATE), np.arange(len(said)), said)
    said = np.concatenate([said, np.zeros(RATE // 10)])
    return np.resize(said, samples)


def _sing(hertz: float, speed: float, style: VoiceStyle, samples: int, random: np.random.Generator) -> np.ndarray:
    """A vowel whose syllables rise and fall `speed` times 3.4 in a second."""
    time = np.arange(samples) / RATE
    first, second = 700 * random.uniform(*style.formants), 1700 * random.uniform(*style.formants)
    sound = np.zeros(samples)
    for harmonic in range(1, 11):
        frequency = harmonic * hertz
        weight = (
            0.25 + math.exp(-(((frequency - first) / 350) ** 2)) + 0.7 * math.exp(-(((frequency - second) / 450) ** 2))
        )
        sound += weight / harmonic * np.sin(2 * np.pi * frequency * time)
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 3.4 * speed * time + random.uniform(0, 2 * np.pi))
    return sound * syllables**1.5


def _glide(sound: np.ndarray, octaves: float) -> np.ndarray:
    """Plays the sound ever faster (or slower), so that its pitch moves by `octaves` over the clip, its length kept."""
    rate = 2 ** (octaves * np.linspace(-0.5, 0.5, len(sound)))
    place = np.cumsum(rate)
    return np.interp(place % (len(sound) - 1), np.arange(len(sound)), sound)


def _with_quality(sound: np.ndarray, quality: int, random: np.random.Generator) -> np.ndarray:
    """`sound` (root mean square 1) as it is (0), breathy: half of it turned to noise (1), or rough: fluttering (2)."""
    if quality == 1:
        power = np.cumsum(np.pad(sound**2, (200, 200), mode="edge"))
        envelope = np.sqrt((power[400:] - power[:-400]) / 400)
        return 0.5 * sound + 0.6 * envelope * random.normal(0, 1, len(sound))
    if quality == 2:
        return sound * (1 + 0.9 * np.sign(np.sin(2 * np.pi * 42 * np.arange(len(sound)) / RATE)))
    return sound
