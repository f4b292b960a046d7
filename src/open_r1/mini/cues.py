"""What a clip of the miniature shows and sounds like: emotions, cues, kinds of clips, and the best possible answer.

An emotion has a typical level in each of five visible and five audible cues; a clip shows each cue at its emotion's
typical level with probability `TYPICAL`, else at one of the two other levels. The label is thus never certain, and
Bayes' rule on the true cues gives the best score that anyone can reach.
"""

from dataclasses import dataclass

import numpy as np

# cue -> words of its levels 0, 1, 2
PICTURE_CUES = {
    "mouth": ("frowning", "straight", "smiling"),
    "lips": ("pressed", "parted", "open"),
    "brows": ("lowered", "level", "raised"),
    "eyes": ("narrowed", "relaxed", "wide"),
    "head": ("still", "nodding", "shaking"),
}
SOUND_CUES = {
    "pitch": ("low", "medium", "high"),
    "contour": ("falling", "steady", "rising"),
    "loudness": ("soft", "moderate", "loud"),
    "tempo": ("slow", "measured", "fast"),
    "quality": ("clear", "breathy", "rough"),
}

# emotion -> typical levels of the picture's and of the sound's cues; any two but calm differ in three or more
PROTOTYPES = {
    "happy": ((2, 1, 1, 1, 1), (2, 2, 2, 2, 0)),
    "sad": ((0, 0, 2, 0, 0), (0, 0, 0, 0, 1)),
    "neutral": ((1, 0, 1, 1, 0), (1, 1, 1, 1, 0)),
    "angry": ((0, 2, 0, 1, 1), (1, 0, 2, 2, 2)),
    "surprise": ((1, 2, 2, 2, 0), (2, 2, 1, 0, 1)),
    "disgust": ((1, 0, 0, 0, 2), (0, 1, 1, 0, 2)),
    "fear": ((0, 1, 2, 2, 2), (2, 1, 0, 2, 1)),
    "contemptuous": ((2, 1, 0, 0, 0), (0, 1, 2, 1, 1)),
    "disappointed": ((0, 0, 1, 2, 1), (0, 0, 1, 2, 0)),
    "helpless": ((0, 2, 1, 0, 2), (2, 0, 0, 1, 2)),
    "anxious": ((1, 1, 0, 2, 1), (0, 2, 0, 2, 2)),
    "calm": ((2, 0, 1, 0, 1), (1, 1, 0, 0, 0)),
}
TYPICAL = 0.85
KINDS = ("agree", "picture", "sound", "conflict")


@dataclass(frozen=True)
class Population:
    """Which emotions occur how often, and how they show.

    Attributes:
        prior: emotion -> share of the clips.
        mix: shares of `KINDS`: picture and sound agree; only the picture, or only the sound, shows the emotion and the
            other is neutral; picture and sound show two emotions, of which the sound's is the label.
    """

    prior: dict[str, float]
    mix: tuple[float, float, float, float]

    @property
    def emotions(self) -> tuple[str, ...]:
        return tuple(self.prior)


@dataclass(frozen=True)
class Scene:
    """One clip's truth: its label, the emotion that each modality shows, and the levels (0, 1, 2) of the cues."""

    label: str
    kind: str
    picture_emotion: str
    sound_emotion: str
    picture: tuple[int, ...]
    sound: tuple[int, ...]
    split: str = ""
    index: int = 0


def draw_scene(population: Population, random: np.random.Generator, split: str = "", index: int = 0) -> Scene:
    """A clip of this population; a neutral one always agrees."""
    emotions, shares = population.emotions, np.array(list(population.prior.values()))
    label = emotions[random.choice(len(emotions), p=shares / shares.sum())]
    kind = "agree" if label == "neutral" else KINDS[random.choice(len(KINDS), p=population.mix)]
    picture = sound = label
    if kind == "picture":
        sound = "neutral"
    elif kind == "sound":
        picture = "neutral"
    elif kind == "conflict":
        others = [emotion for emotion in emotions if emotion not in (label, "neutral")]
        picture = others[random.integers(len(others))]
    return Scene(
        label,
        kind,
        picture,
        sound,
        _draw_levels(PROTOTYPES[picture][0], random),
        _draw_levels(PROTOTYPES[sound][1], random),
        split,
        index,
    )


def _draw_levels(typical: tuple[int, ...], random: np.random.Generator) -> tuple[int, ...]:
    return tuple(level if random.random() < TYPICAL else int((level + random.integers(1, 3)) % 3) for level in typical)


def best_answer(scene: Scene, population: Population) -> str:
    """The most probable label given the true cues, by Bayes' rule; its accuracy is the ceiling of the task."""
    shows = {e: _likelihood(scene.picture, PROTOTYPES[e][0]) for e in (*population.emotions, "neutral")}
    sounds = {e: _likelihood(scene.sound, PROTOTYPES[e][1]) for e in (*population.emotions, "neutral")}
    agree, picture_only, sound_only, conflict = population.mix

    def posterior(emotion: str) -> float:
        prior = population.prior[emotion]
        if emotion == "neutral":
            return prior * shows["neutral"] * sounds["neutral"]
        others = [shows[other] for other in population.emotions if other not in (emotion, "neutral")]
        return prior * (
            agree * shows[emotion] * sounds[emotion]
            + picture_only * shows[emotion] * sounds["neutral"]
            + sound_only * shows["neutral"] * sounds[emotion]
            + conflict * np.mean(others) * sounds[emotion]
        )

    return max(population.emotions, key=posterior)


def _likelihood(levels: tuple[int, ...], typical: tuple[int, ...]) -> float:
    hits = sum(level == expected for level, expected in zip(levels, typical, strict=True))
    return TYPICAL**hits * ((1 - TYPICAL) / 2) ** (len(typical) - hits)
