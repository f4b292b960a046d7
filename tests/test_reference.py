"""Figures of the untrained checkpoint, so that a clone without the golden record still notices a numeric change.

`reference.json` holds them; after a change that is meant to alter them: `python tests/test_reference.py --write`.
"""

import dataclasses
import json
import sys
import tempfile
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import humanomni
from humanomni.processing import Media
from humanomni.prompts import DEFAULT_INSTRUCT, MODAL_TAGS, PROMPT_STYLES
from humanomni.tiny import TINY, build_checkpoint

TABLE = Path(__file__).with_name("reference.json")
EXAMPLE = Path(__file__).parents[1] / "assets" / "example.mp4"
VARIANTS = {
    "like_the_0.5B": TINY,
    "like_the_7B": dataclasses.replace(
        TINY, tied=False, projector_type="all_in_one", image_size=40, mel_bins=80, num_frames=4, start_end=False
    ),
}
NEW_TOKENS = 8
SHOWN_LOGITS = slice(None, None, 97)
# Sums are rounded differently on another CPU: 1e-5 on these logits, measured against float64.
TOLERANCES = {"inputs": 1e-4, "features": 1e-4, "cases": 1e-3}
# Another build of ffmpeg may round colours and resample sound otherwise: one level of noise on every pixel moves these
# figures by 0.01, measured, but single logits by 0.4.
EXAMPLE_TOLERANCE = 0.05
CLOSE_CALL = 5e-3  # a greedy step whose two best logits are this near may go either way


def digest(values: torch.Tensor) -> list[float]:
    """Mean, standard deviation, and a sum in which every place has a weight of its own."""
    flat = values.detach().double().flatten()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return [flat.mean().item(), flat.std().item(), (flat @ weights).item() / flat.numel() ** 0.5]


def fingerprint(ids: list[int]) -> list[int]:
    """Length and checksum of token ids."""
    return [len(ids), zlib.crc32(np.asarray(ids, "<i4").tobytes())]


def synthetic_media(processor) -> dict[str, Media]:
    """Media by modal, made of arrays: moving waves of colour, and a tone that rises and falls."""
    time, row, column, channel = np.ogrid[:11, :54, :72, :3]
    frames = (127.5 + 127 * np.sin(row / 9 + channel) * np.cos(column / 7 - time / 2)).astype(np.uint8)
    seconds = np.arange(40000) / 16000
    wave = (0.4 * np.sin(2 * np.pi * (300 * seconds + 90 * np.sin(2 * seconds)))).astype(np.float32)
    video = processor.load_media(frames, "video", image_aspect_ratio="pad").frames
    audio = processor.load_media(wave, "audio").audio
    return {
        "video_audio": Media(frames=video, audio=audio),
        "video": Media(frames=video),
        "audio": Media(audio=audio),
        "image": processor.load_media(frames[0], "image"),
        "text": Media(),
    }


@torch.no_grad()
def features(backbone, batch) -> dict[str, list[float]]:
    encoded = backbone.encode(**{name: batch[name] for name in batch if name not in ("input_ids", "attention_mask")})
    query = encoded["query_features"]
    branches = dict(zip(("video", "body", "face"), backbone.mm_projector(encoded["video_features"]), strict=True))
    seen = {
        **encoded,
        **branches,
        "gate": backbone.bert_gate(query).softmax(-1),
        "fused": backbone.project_video(encoded["video_features"], query),
        "sound": backbone.project_audio(encoded["audio_features"]),
        "embeddings": backbone.embed(batch["input_ids"], **encoded),
    }
    return {name: digest(values) for name, values in seen.items()}


@torch.no_grad()
def answer(model, batch, greedy: bool) -> dict:
    ids = batch["input_ids"][0].tolist()
    logits = model(**batch).logits[0]
    figures = {"ids": fingerprint(ids), "last": logits[-1, SHOWN_LOGITS].tolist(), "all": digest(logits)}
    if greedy:
        made = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best = [step[0].topk(2).values for step in made.logits]
        figures["greedy"] = made.sequences[0, len(ids) :].tolist()
        figures["margins"] = [(first - second).item() for first, second in best]
    return figures


def measure(folder: Path) -> dict:
    """All figures of a checkpoint, in the form of the table."""
    model, processor = humanomni.load_pretrained(folder, dtype="float32", device="cpu")
    media = synthetic_media(processor)
    both = processor(DEFAULT_INSTRUCT, media["video_audio"])
    cases = {}
    for style, modal in product(PROMPT_STYLES, MODAL_TAGS):
        batch = processor(DEFAULT_INSTRUCT, media[modal], modal, prompt_style=style)
        cases[f"{style} {modal}"] = answer(model, batch, greedy=style == "inference")
    example = processor(DEFAULT_INSTRUCT, EXAMPLE)
    answered = answer(model, example, greedy=False)
    return {
        "inputs": {
            "frames": digest(media["video"].frames),
            "image": digest(media["image"].image),
            "log_mel": digest(media["audio"].audio),
            "query": fingerprint(both["bert_input_ids"][0].tolist()),
        },
        "features": features(model.model, both),
        "cases": cases,
        "example": {
            "frames": digest(example["pixel_values_videos"]),
            "log_mel": digest(example["input_features"])[:2],
            "ids": answered["ids"],
            "all": answered["all"],
        },
    }


def differences(ours, theirs, tolerance: float, name: str) -> list[str]:
    """Where two sets of figures differ: whole numbers at all, others by more than `tolerance`."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        return [line for key in theirs for line in differences(ours[key], theirs[key], tolerance, f"{name} {key}")]
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for place, pair in pairs for line in differences(*pair, tolerance, f"{name} [{place}]")]
    same = ours == theirs if isinstance(theirs, int) else abs(ours - theirs) <= tolerance
    return [] if same else [f"{name}: {ours}, not {theirs}"]


def cut_at_a_close_call(case: dict, margins: list[float]) -> dict:
    """A case without margins, whose greedy ids end before the first step that may go either way."""
    sure = next((step for step, margin in enumerate(margins) if margin < CLOSE_CALL), NEW_TOKENS)
    return {**{name: case[name] for name in case if name != "margins"}, "greedy": case["greedy"][:sure]}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    folder = build_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint", geometry=VARIANTS[request.param])
    return folder, json.loads(TABLE.read_text())[request.param]


def test_the_figures_are_those_of_the_table(variant):
    folder, table = variant
    ours = measure(folder)
    for name, case in table["cases"].items():
        if "greedy" in case:
            for figures in (ours, table):
                figures["cases"][name] = cut_at_a_close_call(figures["cases"][name], case["margins"])
    found = differences(ours.pop("example"), table.pop("example"), EXAMPLE_TOLERANCE, "example")
    for part, tolerance in TOLERANCES.items():
        found += differences(ours[part], table[part], tolerance, part)
    assert ours.keys() == table.keys() == TOLERANCES.keys()
    assert not found, "\n".join(found)


def test_a_batch_of_all_modals_gives_each_its_figures(variant):
    folder, table = variant
    model, processor = humanomni.load_pretrained(folder, dtype="float32", device="cpu")
    media = synthetic_media(processor)
    longer = f"{DEFAULT_INSTRUCT} Take your time."  # pads the questions of all the others
    rows = {**media, "longer": Media()}
    batch = processor(
        [longer if name == "longer" else DEFAULT_INSTRUCT for name in rows],
        list(rows.values()),
        ["text" if name == "longer" else name for name in rows],
    )
    with torch.no_grad():
        logits = model(**batch).logits[:-1, -1, SHOWN_LOGITS].tolist()
    expected = [table["cases"][f"inference {modal}"]["last"] for modal in media]
    assert not differences(logits, expected, TOLERANCES["cases"], "row")


def write_table() -> None:
    """Measures all variants anew and replaces `reference.json`: one line a record, six decimals."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, geometry in VARIANTS.items():
            figures = measure(build_checkpoint(Path(folder) / name, geometry=geometry))
            parts = [f'  "{part}": {{\n{_records(figures[part])}\n  }}' for part in figures]
            lines.append(f'"{name}": {{\n' + ",\n".join(parts) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _records(part: dict) -> str:
    return ",\n".join(f'    "{key}": {json.dumps(_rounded(value))}' for key, value in part.items())


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_reference.py --write")
    write_table()
