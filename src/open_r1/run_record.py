"""What a training run leaves beside its checkpoint: the settings and environment it ran with, and its curves."""

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import pandas as pd
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

logger = logging.getLogger(__name__)

CONFIG_FILE = "config_resolved.yaml"
ENVIRONMENT_FILE = "environment.json"
SMOOTHED_FROM = 50  # points; below, a curve is readable as it is
SECRET_OPTION = re.compile(r"(--?\w*(?:token|password|secret|api_key))(?:=.*)?", re.IGNORECASE | re.DOTALL)


def write_run_record(output_dir: str | os.PathLike, config: dict) -> None:
    """Writes `config_resolved.yaml` and `environment.json`, at the start of a run; the main process alone writes.

    Args:
        config: every setting by name, with the value that is in force.
    """
    if not _is_main_process():
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(config, default=str))  # paths and enumerations as text: YAML that any reader takes
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(plain, allow_unicode=True), "utf-8")
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(environment(), indent=2) + "\n", "utf-8")


def environment() -> dict:
    """What the run's result may depend on besides its settings."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_without_secrets(sys.orig_argv)),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "packages": {
            package.name: package.version for package in sorted(distributions(), key=lambda p: p.name.lower())
        },
    }


def git_state(folder: Path) -> dict | None:
    """Revision of the repository that tracks `folder`, and whether its files differ from it; None outside of git.

    A folder that git ignores, such as an environment inside a repository, is outside.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        if not git("ls-files"):
            return None
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _without_secrets(arguments: list[str]) -> list[str]:
    """The command line, the values of options such as `--hub_token` hidden."""
    kept, hide = [], False
    for argument in arguments:
        secret = SECRET_OPTION.fullmatch(argument)
        if hide:
            kept.append("***")
        else:
            kept.append(f"{secret[1]}=***" if secret and "=" in argument else argument)
        hide = not hide and secret is not None and "=" not in argument
    return kept


def plot_training_curves(log_history: list[dict], path: str | os.PathLike, panels: dict[str, list[str]]) -> None:
    """Draws a run's figures over its steps into a PNG, at the end of a run; the main process alone draws.

    Args:
        log_history: what the trainer logged: `step` and some figures in each entry.
        panels: title -> names of the figures in it; names that were never logged, and empty panels, are left out.
    """
    if not _is_main_process():
        return
    curves = {title: {name: _curve(log_history, name) for name in names} for title, names in panels.items()}
    curves = {title: {n: curve for n, curve in drawn.items() if len(curve)} for title, drawn in curves.items()}
    curves = {title: drawn for title, drawn in curves.items() if drawn}
    if not curves:
        logger.warning("%s is not drawn: nothing of %s was logged", path, ", ".join(panels) or "no panel")
        return
    columns = min(len(curves), 2 if len(curves) <= 4 else 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="constrained")
    for place, (title, drawn) in enumerate(curves.items(), start=1):
        _draw(figure.add_subplot(rows, columns, place), title, drawn)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _curve(log_history: list[dict], name: str) -> pd.Series:
    """The finite values of one figure by step."""
    points = {
        entry["step"]: entry[name]
        for entry in log_history
        if "step" in entry and isinstance(entry.get(name), (int, float))
    }
    values = pd.Series(points, dtype=float)
    return values[values.abs() != float("inf")].dropna()


def _draw(axes: Axes, title: str, curves: dict[str, pd.Series]) -> None:
    for name, curve in curves.items():
        if len(curve) < SMOOTHED_FROM:
            axes.plot(curve.index, curve, marker="o", ms=3, lw=0.8, label=name)
            continue
        (line,) = axes.plot(curve.index, curve, lw=0.8, alpha=0.3)
        window = max(len(curve) // 50, 5)
        mean = curve.rolling(window, center=True, min_periods=1).mean()
        axes.plot(mean.index, mean, lw=1.6, color=line.get_color(), label=f"{name} (mean of {window})")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel(next(iter(curves)) if len(curves) == 1 else "value")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
