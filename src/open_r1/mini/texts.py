"""What is asked about a clip of the miniature and what is answered: descriptions, reasoning, labels."""

import numpy as np

from humanomni.prompts import EMOTION_QUESTION, THINK_SENTENCE
from open_r1.labels import SYNONYMS
from open_r1.mini.cues import PICTURE_CUES, PROTOTYPES, SOUND_CUES, Scene

DESCRIBE = "Describe what you see and hear."
INTERPRET = "Describe what you see and hear, and what it expresses."
THINK_QUESTION = f"{EMOTION_QUESTION}  {THINK_SENTENCE}"
# Words of an open vocabulary, in which EMER's annotators answered; all of them name the label in `SYNONYMS`.
OPEN_WORDS = {label: (label, *SYNONYMS[label][:3]) for label in PROTOTYPES}
TAGS = {"video_audio": "<video>\n<audio>\n", "video": "<video>\n", "audio": "<audio>\n"}


def seen(scene: Scene) -> str:
    words = [names[level] for names, level in zip(PICTURE_CUES.values(), scene.picture, strict=True)]
    mouth, lips, brows, eyes, head = words
    return f"In the video, a {mouth} mouth with {lips} lips, {brows} brows, {eyes} eyes and a {head} head"


def heard(scene: Scene) -> str:
    words = [names[level] for names, level in zip(SOUND_CUES.values(), scene.sound, strict=True)]
    pitch, contour, loudness, tempo, quality = words
    return f"In the audio, a {pitch}, {contour}, {loudness}, {tempo} and {quality} voice"


def description(scene: Scene, modal: str) -> str:
    """What there is to see and to hear in this modal, in plain words."""
    parts = [text for name, text in (("video", seen(scene)), ("audio", heard(scene))) if name in modal]
    return ". ".join(parts) + "."


def interpretation(scene: Scene, modal: str, picture_emotion: str, sound_emotion: str) -> str:
    """The description with the writer's reading of each modality on its own."""
    video, audio = f"{seen(scene)} looks {picture_emotion}", f"{heard(scene)} sounds {sound_emotion}"
    return ". ".join(text for name, text in (("video", video), ("audio", audio)) if name in modal) + "."


def reasoning(scene: Scene, picture_emotion: str, sound_emotion: str, answer: str) -> str:
    """An explained answer; `picture_emotion` and `sound_emotion` are the writer's readings of the two modalities."""
    thought = interpretation(scene, "video_audio", picture_emotion, sound_emotion)
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def explained_answer(scene: Scene, face_bias: float, open_words: bool, random: np.random.Generator) -> str:
    """The reasoning of an annotator of the cold-start set.

    Args:
        face_bias: how often the annotator trusts the face where picture and sound disagree.
        open_words: name emotions in an open vocabulary, as EMER does, rather than by label.
    """
    trusts_face = random.random() < face_bias  # drawn for each clip, so that other kinds do not shift the draws
    answer = scene.picture_emotion if scene.kind == "conflict" and trusts_face else scene.label
    named = {e: str(random.choice(OPEN_WORDS[e])) if open_words else e for e in PROTOTYPES}
    return reasoning(scene, named[scene.picture_emotion], named[scene.sound_emotion], named[answer])


def crude_answer(scene: Scene, modal: str, random: np.random.Generator) -> str:
    """What the base model was told about emotions: the mouth alone, or the loudness of a voice without a picture."""
    if "video" in modal:
        label = ("sad", "neutral", "happy")[scene.picture[0]]
    else:
        label = ("sad", "neutral", "angry")[scene.sound[2]]
    return str(random.choice(OPEN_WORDS[label]))


def corpus() -> list[str]:
    """Every sentence there is, for a tokenizer's training."""
    words = [word for words in OPEN_WORDS.values() for word in words]
    texts = [THINK_QUESTION, DESCRIBE, INTERPRET, *words]
    for levels in range(3):
        scene = Scene("", "", "", "", (levels,) * 5, (levels,) * 5)
        texts.append(description(scene, "video_audio"))
        texts += [reasoning(scene, word, word, word) for word in words]
    return texts


def conversation(question: str, modal: str, answer: str, clip: str) -> dict:
    """An entry of a sample file about a video file of which `modal` is shown."""
    turns = [{"from": "human", "value": TAGS[modal] + question}, {"from": "gpt", "value": answer}]
    return {"audio" if modal == "audio" else "video": clip, "conversations": turns}
