"""The tables of the project: each set's classes, codes and published counts, and the words that mean a class."""

from pathlib import Path

import yaml

from humanomni.errors import HumanOmniError

EMOTION_WORDS = (
    "happy", "surprise", "neutral", "angry", "disgust", "sad", "fear",
    "contemptuous", "disappointed", "helpless", "anxious",
)  # fmt: skip

CLASSES = {
    "dfew": ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),
    "mafw": (
        "angry", "disgust", "fear", "happy", "neutral", "sad", "surprise",
        "contemptuous", "anxious", "helpless", "disappointed",
    ),
    "ravdess": ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"),
}  # fmt: skip

DFEW_IDS = {"1": "happy", "2": "sad", "3": "neutral", "4": "angry", "5": "surprise", "6": "disgust", "7": "fear"}
DFEW_NO_SINGLE_LABEL = "0"

MAFW_WORDS = {
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprise",
    "contempt": "contemptuous",
    "anxiety": "anxious",
    "helplessness": "helpless",
    "disappointment": "disappointed",
}
# Only for Labels/single-set.xlsx: other public lists number the classes differently, so splits are read by word.
MAFW_IDS = {str(number): label for number, label in enumerate(CLASSES["mafw"], start=1)}
MAFW_WITHOUT_SOUND = (
    "00903", "03414", "03440", "03721", "03724", "03726", "03727", "03728",
    "03730", "03732", "03810", "03855", "03927", "03928", "03931", "09529",
)  # fmt: skip

RAVDESS_CODES = {f"{code:02d}": label for code, label in enumerate(CLASSES["ravdess"], start=1)}
RAVDESS_ACTORS = tuple(range(1, 25))
RAVDESS_ACTORS_WITHOUT_SONG = (18,)
RAVDESS_CLIPS_PER_ACTOR = {  # by vocal channel: 01 speech, 02 song, which leaves out two emotions
    "01": {label: 4 if label == "neutral" else 8 for label in CLASSES["ravdess"]},
    "02": {"neutral": 4, "calm": 8, "happy": 8, "sad": 8, "angry": 8, "fear": 8},
}

# Published number of clips, by fold (1 to 5) and split.
DFEW_FOLD_COUNTS = {"train": (9356, 9356, 9357, 9358, 9361), "test": (2341, 2341, 2340, 2339, 2336)}
DFEW_FOLD_1_TEST_COUNTS = {
    "happy": 489, "sad": 379, "neutral": 534, "angry": 435, "surprise": 294, "disgust": 29, "fear": 181,
}  # fmt: skip
DFEW_TOTAL = 11697
MAFW_FOLD_COUNTS = {"train": (7333, 7335, 7339, 7340, 7341), "test": (1839, 1837, 1833, 1832, 1831)}
MAFW_CLASS_COUNTS = {
    "angry": 1390, "disgust": 639, "fear": 625, "happy": 1242, "neutral": 1138, "sad": 1470, "surprise": 1072,
    "contemptuous": 236, "anxious": 916, "helpless": 262, "disappointed": 182,
}  # fmt: skip
MAFW_COMPOUND_TOTAL = 8996
EMER_ROWS = {"final-EMER-reason.csv": 332, "gt-eng.csv": 100, "gt-chi.csv": 100}

# Words that mean a class, for the label-map score. A word under two labels goes to the first one that the set has:
# "peaceful" is calm in RAVDESS and neutral elsewhere. A word whose labels a set lacks stays outside its classes.
SYNONYMS = {
    "happy": (
        "happiness", "joy", "joyful", "joyous", "cheerful", "delighted", "delight", "glad", "pleased", "amused",
        "amusement", "elated", "excited", "excitement", "smiling", "laughing",
    ),
    "surprise": (
        "surprised", "surprising", "astonished", "astonishment", "amazed", "amazement", "shocked", "shock", "startled",
    ),
    "calm": ("calmness", "peaceful", "relaxed", "serene", "composed", "tranquil"),
    "neutral": (
        "neutrality", "no emotion", "emotionless", "expressionless", "calm", "calmness", "peaceful", "relaxed",
        "serene", "composed", "tranquil",
    ),
    "angry": (
        "anger", "mad", "furious", "fury", "rage", "enraged", "outraged", "indignant", "irritated", "irritation",
        "annoyed", "annoyance",
    ),
    "disgust": ("disgusted", "disgusting", "repulsed", "revolted", "revulsion", "aversion"),
    "sad": (
        "sadness", "sorrow", "sorrowful", "unhappy", "unhappiness", "grief", "grieving", "grieved", "heartbroken",
        "depressed", "melancholy", "mournful", "tearful", "crying",
    ),
    "fear": (
        "fearful", "afraid", "scared", "frightened", "terrified", "terror", "horrified", "horror", "panic", "panicked",
    ),
    "contemptuous": ("contempt", "disdain", "disdainful", "scorn", "scornful"),
    "disappointed": ("disappointment", "disappointing", "let down"),
    "helpless": ("helplessness", "powerless", "powerlessness"),
    "anxious": (
        "anxiety", "anxiousness", "worried", "worry", "worrying", "nervous", "nervousness", "uneasy", "unease",
        "uneasiness", "concerned", "apprehensive",
    ),
}  # fmt: skip


def canonical(word, classes, synonyms=SYNONYMS):
    """Returns the class of `classes` that one word or phrase names, itself or through `synonyms`; None if none.

    Case, surrounding blanks and surrounding punctuation do not matter.
    """
    word = " ".join(word.casefold().strip(" \t\r\n.,;:!?*\"'`()[]").split())
    if word in classes:
        return word
    return next((label for label, words in synonyms.items() if label in classes and word in words), None)


def read_synonyms(path):
    """Reads a user's table, YAML or JSON: `{label: [word, ...]}`, in the shape of `SYNONYMS`.

    Raises `HumanOmniError` if the file cannot be read or has another shape.
    """
    try:
        table = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise HumanOmniError(f"label map {path} cannot be read ({reason}); give a YAML or JSON file") from error
    if not isinstance(table, dict) or not all(
        isinstance(label, str) and isinstance(words, list) and all(isinstance(word, str) for word in words)
        for label, words in table.items()
    ):
        raise HumanOmniError(f"label map {path} is not a table of word lists; write it as 'happy: [joyful, glad]'")
    return {label: tuple(word.casefold() for word in words) for label, words in table.items()}
