"""Predictions on disk: appended as they come by any number of processes, merged into one file, and read again."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from humanomni.errors import HumanOmniError

PREDICTIONS, SETTINGS, UNFINISHED = "predictions.jsonl", "settings.json", "unfinished"


class PredictionFolder:
    """The predictions of one checkpoint on one set, of which a kill at any moment loses at most a line.

    `predictions.jsonl` is written when the last prediction is there; until then, `unfinished/` holds a file a process.
    A line is an object with `index`, the sample's number, and whatever a prediction says; `error` marks a failed one.

    Args:
        settings: what the answers depend on; a folder made with other settings is refused.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict):
        self.folder = Path(folder)
        self.settings = settings

    def open(self) -> dict[int, dict]:
        """Returns the lines of earlier runs by index; to be called by one process, before any of them appends.

        Raises:
            HumanOmniError: the folder holds predictions made with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        file = self.folder / SETTINGS
        found = json.loads(file.read_text("utf-8")) if lines and file.exists() else {}
        for name in sorted({*found, *self.settings}) if lines else ():
            if found.get(name) != self.settings.get(name):
                raise HumanOmniError(
                    f"{self.folder} holds predictions made with {name} {_short(found.get(name))}, not "
                    f"{_short(self.settings.get(name))}; remove it or choose another --output_dir"
                )
        write_json(file, self.settings)
        (self.folder / UNFINISHED).mkdir(exist_ok=True)
        return lines

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[dict], None]]:
        """A function that adds a line to this process's file; each line is on its way to the disk when it returns."""
        path = self.folder / UNFINISHED / f"rank{rank}.jsonl"
        _drop_half_line(path)
        with open(path, "a", encoding="utf-8") as file:

            def add(line: dict) -> None:
                file.write(to_line(line))
                file.flush()

            yield add

    def finish(self, count: int) -> list[dict]:
        """Writes `predictions.jsonl`, sorted by index, and returns its lines; to be called when all have appended."""
        lines = [line for _, line in sorted(self._read().items())]
        if [line["index"] for line in lines] != list(range(count)):
            raise RuntimeError(f"{self.folder} has {len(lines)} predictions for {count} samples")
        write_whole(self.folder / PREDICTIONS, "".join(map(to_line, lines)))
        shutil.rmtree(self.folder / UNFINISHED)
        return lines

    def _read(self) -> dict[int, dict]:
        """The whole lines by index; an answer stands before an error about the same sample."""
        lines = {}
        for file in [self.folder / PREDICTIONS, *sorted((self.folder / UNFINISHED).glob("rank*.jsonl"))]:
            for text in file.read_bytes().split(b"\n") if file.exists() else ():
                try:
                    line = json.loads(text)
                    index = line["index"]
                except (ValueError, TypeError, KeyError):
                    continue  # cut short by a kill: asked again
                if index not in lines or "error" in lines[index]:
                    lines[index] = line
        return lines


def _drop_half_line(path: Path) -> None:
    """Cuts a file after its last line break, so that what is appended starts on a line of its own."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def to_line(fields: dict) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def write_json(path: Path, content) -> None:
    """Writes indented JSON; the file appears whole or not at all."""
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by `text`: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    # A foreign response may hold half a surrogate pair, which UTF-8 cannot write.
    draft.write_bytes(text.encode("utf-8", errors="replace"))
    os.replace(draft, path)


def read_predictions(path: str | os.PathLike) -> list[dict]:
    """Reads a JSON list or JSON lines of predictions, those written here or by the release's scripts.

    Returns:
        For each a dict with `video`, `label`, `response` (None where the clip failed), `error` and `source`, the name
        of its set or None. The release calls label and clip `gt` and `video_path`.

    Raises:
        HumanOmniError: the file does not read, or an entry lacks its label or response.
    """
    predictions = []
    for place, entry in _entries(Path(path)):
        if not isinstance(entry, dict):
            raise HumanOmniError(f"{path}, {place} is a {type(entry).__name__}, not an object with label and response")
        label = entry.get("label", entry.get("gt"))
        response = entry.get("response")
        if not isinstance(label, str) or not label.strip():
            raise HumanOmniError(f"{path}, {place}: label (or gt) is {label!r}, not a word; mend the file")
        if not isinstance(response, str) and not (response is None and ("response" in entry or "error" in entry)):
            raise HumanOmniError(f"{path}, {place}: response is {response!r}, not a text; mend the file")
        source = entry.get("source")
        predictions.append(
            {
                "video": str(entry.get("video") or entry.get("video_path") or ""),
                "label": label.strip(),
                "response": response,
                "error": None if response is not None else str(entry.get("error") or "no response"),
                "source": str(source).strip().lower() if source else None,
            }
        )
    if not predictions:
        raise HumanOmniError(f"{path} holds no predictions; give a JSON list or JSON lines")
    return predictions


def _entries(path: Path) -> list[tuple[str, object]]:
    """The entries of the file, each with its place for messages."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise HumanOmniError(f"{path} does not exist; pass a file of predictions with --predictions") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HumanOmniError(f"{path} does not read as UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            return [(f"entry {index}", entry) for index, entry in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise HumanOmniError(f"{path} is not JSON: {error}") from error
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise HumanOmniError(f"{path}, line {number} is not JSON: {error}") from error
    return entries
