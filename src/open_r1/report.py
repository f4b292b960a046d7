"""Shows an evaluation: figures, a Markdown table beside the published rows, and one HTML file that needs nothing else.

Everything a model wrote is escaped, and the page's content policy forbids any request and any script but its own.
"""

import base64
import hashlib
import io
import statistics
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

from open_r1.metrics import parse_answer

# WAR and UAR as published, on DFEW, MAFW and RAVDESS (arXiv 2503.05379).
PUBLISHED = {
    "HumanOmni-0.5B": {"dfew": (22.64, 19.44), "mafw": (20.18, 13.52), "ravdess": (7.33, 9.38)},
    "EMER-SFT": {"dfew": (38.66, 35.31), "mafw": (38.39, 28.02), "ravdess": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"dfew": (60.23, 44.39), "mafw": (50.44, 30.39), "ravdess": (29.33, 30.75)},
    "R1-Omni": {"dfew": (65.83, 56.27), "mafw": (57.68, 40.04), "ravdess": (43.00, 44.69)},
}
PUBLISHED_ON = (
    "The published figures are those of arXiv 2503.05379; they fit DFEW with one official fold, MAFW with 1,477 clips "
    "that are no official fold, and RAVDESS with 300 clips of five actors."
)
COLUMNS = ("set", "model", "clips", "WAR", "UAR", "WAR, mapped", "UAR, mapped", "format", "failed")


@dataclass
class Run:
    """One checkpoint on one set (and fold).

    `metrics` comes from `open_r1.metrics.score`. A prediction is a dict with `video`, `label`, `response` (None if the
    clip failed) and, for a failed clip, `error`.
    """

    model: str
    dataset: str
    metrics: dict
    predictions: list[dict]
    fold: int | None = None

    @property
    def name(self):
        return self.dataset + ("" if self.fold is None else f" fold {self.fold}")


def write_report(folder, runs, preface=""):
    """Writes `report.html`, `report.md` and two PNG figures a run into `folder`; returns the path of the page.

    The figures of several runs are told apart by number and name. `preface` is HTML that opens the page, made with
    `html_table` and `html_image`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for number, run in enumerate(runs, start=1):
        strict = run.metrics["strict"]
        figures.append((draw_confusion_matrix(strict["confusion_matrix"]), draw_per_class(strict["per_class"])))
        for kind, png in zip(("confusion_matrix", "per_class"), figures[-1], strict=True):
            which = "" if len(runs) == 1 else f"_{number}_{run.name.replace(' ', '_')}"
            (folder / f"{kind}{which}.png").write_bytes(png)
    (folder / "report.md").write_text(markdown_table(table_rows(runs)), encoding="utf-8")
    page = folder / "report.html"
    # A response may hold half a surrogate pair, which UTF-8 cannot write.
    page.write_bytes(html_page(runs, figures, preface).encode("utf-8", errors="replace"))
    return page


def table_rows(runs):
    """The rows of the result table under `COLUMNS`: by set the runs, the mean over folds, then the published rows."""
    rows = []
    for dataset, by_model in _grouped(runs).items():
        for model, folds in by_model.items():
            rows += [_run_row(run) for run in folds]
            if len(folds) > 1:
                rows.append(_mean_row(dataset, model, folds))
        for model, published in PUBLISHED.items():
            if dataset in published:
                war, uar = published[dataset]
                rows.append((dataset, f"{model} (published)", "", f"{war:.2f}", f"{uar:.2f}", "", "", "", ""))
    return rows


def fold_means(runs):
    """For each model and set with several folds: `model`, `dataset`, `folds`, and what `fold_mean` gives."""
    return [
        {"model": model, "dataset": dataset, "folds": [run.fold for run in folds], **fold_mean(folds)}
        for dataset, by_model in _grouped(runs).items()
        for model, folds in by_model.items()
        if len(folds) > 1
    ]


def fold_mean(folds):
    """The plain mean of WAR, UAR and the format rate over runs, and the sums of clips and failures."""

    def mean(kind, name):
        return statistics.fmean(run.metrics[kind][name] for run in folds)

    return {
        "n": sum(run.metrics["n"] for run in folds),
        "failed": sum(run.metrics["failed"] for run in folds),
        **{kind: {name: mean(kind, name) for name in ("war", "uar")} for kind in ("strict", "label_map")},
        "format_rate": statistics.fmean(run.metrics["format_rate"] for run in folds),
    }


def markdown_table(rows):
    """Renders `table_rows` as a Markdown table, ending in a line break."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_markdown(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_confusion_matrix(matrix):
    """PNG bytes: true classes down, answers across with "other" last; numbers are clips, colours shares of a row."""
    counts, columns = matrix["counts"], matrix["columns"]
    figure, axes = _figure(2 + 0.75 * len(columns), 1.5 + 0.6 * len(counts))
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(counts)), matrix["rows"])
    axes.set_xlabel("answer (other: outside the classes, or failed)")
    axes.set_ylabel("label")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    return _png(figure)


def draw_per_class(per_class):
    """PNG bytes: recall, precision and F1 of each class in per cent; an undefined one has no bar."""
    figure, axes = _figure(2 + 0.9 * len(per_class), 4)
    for offset, name in enumerate(("recall", "precision", "f1")):
        places = [position + (offset - 1) * 0.27 for position in range(len(per_class))]
        axes.bar(places, [scores[name] or 0 for scores in per_class.values()], width=0.25, label=name)
    ticks = [f"{label}\n(n={scores['support']})" for label, scores in per_class.items()]
    axes.set_xticks(range(len(per_class)), ticks)
    axes.set_ylim(0, 100)
    axes.set_ylabel("per cent")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above, where no bar reaches
    return _png(figure)


def html_page(runs, figures, preface=""):
    """The whole page as text; `figures` holds the two PNGs of each run, `preface` HTML to put first."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = "".join(_section(run, pngs) for run, pngs in zip(runs, figures, strict=True))
    predictions = "".join(map(_predictions, runs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Emotion recognition: evaluation</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Evaluation</h1>
{preface}
{html_table(COLUMNS, table_rows(runs))}
<p>WAR, UAR and rates in per cent, with bootstrap 95 % intervals. "Mapped" reads synonyms through the label map; the
other scores compare the answer with the label letter by letter. {PUBLISHED_ON}</p>
{sections}
<h2>Predictions</h2>
<p><input id="query" type="search" placeholder="search clip, label or response" aria-label="search">
<select id="verdict" aria-label="verdict">
<option value="">all</option><option>right</option><option>mapped</option><option>wrong</option><option>failed</option>
</select> <output id="shown"></output></p>
<table id="predictions">
<thead><tr><th>set</th><th>model</th><th>clip</th><th>label</th><th>answer</th><th>verdict</th><th>response</th></tr></thead>
<tbody>
{predictions}</tbody>
</table>
<script>{SCRIPT}</script>
</body>
</html>
"""


STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top; }
th, td:not(:nth-child(5), :nth-child(7)) { white-space: nowrap; }
thead th { background: #fff; position: sticky; top: 0; }
img { max-width: 100%; }
.figures { align-items: end; display: flex; flex-wrap: wrap; gap: 1em; }
.figures img { flex: 0 1 auto; max-width: 100%; min-width: 0; }
@media (min-width: 70em) { .figures { flex-wrap: nowrap; } .figures img { max-width: 50%; } }
#query { width: 22em; }
#predictions td:nth-child(5) { max-width: 18em; overflow-wrap: anywhere; }
.response { overflow-wrap: anywhere; white-space: pre-wrap; }
.right td:nth-child(6) { color: #17692b; } .wrong td:nth-child(6), .failed td:nth-child(6) { color: #a3161a; }
"""

SCRIPT = """
const rows = [...document.querySelectorAll("#predictions tbody tr")];
const texts = rows.map(row => row.textContent.toLowerCase());
const query = document.getElementById("query"), verdict = document.getElementById("verdict");
function filter() {
  const words = query.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  rows.forEach((row, i) => {
    const fits = words.every(word => texts[i].includes(word)) && (!verdict.value || row.className === verdict.value);
    row.hidden = !fits;
    shown += fits;
  });
  document.getElementById("shown").textContent = `${shown} of ${rows.length}`;
}
query.addEventListener("input", filter);
verdict.addEventListener("change", filter);
filter();
"""


def _run_row(run):
    strict, mapped = run.metrics["strict"], run.metrics["label_map"]
    return (
        run.name,
        run.model,
        str(run.metrics["n"]),
        _with_interval(strict["war"], strict["war_interval"]),
        _with_interval(strict["uar"], strict["uar_interval"]),
        f"{mapped['war']:.2f}",
        f"{mapped['uar']:.2f}",
        f"{run.metrics['format_rate']:.2f}",
        f"{run.metrics['failed']} {run.metrics['failed_clips']}" if run.metrics["failed"] else "0",
    )


def _mean_row(dataset, model, folds):
    mean = fold_mean(folds)
    scores = (mean["strict"]["war"], mean["strict"]["uar"], mean["label_map"]["war"], mean["label_map"]["uar"])
    return (
        f"{dataset}, mean of {len(folds)} folds",
        model,
        str(mean["n"]),
        *(f"{score:.2f}" for score in (*scores, mean["format_rate"])),
        str(mean["failed"]),
    )


def _grouped(runs):
    """The runs as `{dataset: {model: [run, ...]}}`, in their order."""
    grouped = defaultdict(lambda: defaultdict(list))
    for run in runs:
        grouped[run.dataset][run.model].append(run)
    return grouped


def _with_interval(value, interval):
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _rounded(value):
    return "" if value is None else f"{value:.2f}"


def _markdown(cell):
    return escape(" ".join(cell.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|")


def _section(run, pngs):
    metrics = run.metrics
    figures = "".join(
        html_image(alt, png) for alt, png in zip(("confusion matrix", "scores by class"), pngs, strict=True)
    )
    mapped = [(row["answer"], row["label"], str(row["count"])) for row in metrics["label_map"]["mapped"]]
    outside = [(row["answer"], str(row["count"])) for row in metrics["outside_classes"]["answers"]]
    by_class = [
        (label, str(scores["support"]), *(_rounded(scores[name]) for name in ("recall", "precision", "f1")))
        for label, scores in metrics["strict"]["per_class"].items()
    ]
    return f"""<h2>{escape(run.model)} on {escape(run.name)}</h2>
<div class="figures">
{figures}</div>
{html_table(("class", "clips", "recall", "precision", "F1"), by_class)}
<details><summary>{len(mapped)} free-form answers that the label map understood</summary>
{html_table(("answer", "read as", "clips"), mapped)}</details>
<details><summary>{len(outside)} answers outside the classes</summary>
{html_table(("answer", "clips"), outside)}</details>
"""


def html_image(alt, png):
    """An image that holds its own bytes."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'


def html_table(head, rows):
    """A table of escaped texts."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _predictions(run):
    mapped = {row["answer"]: row["label"] for row in run.metrics["label_map"]["mapped"]}
    return "".join(_prediction(run, prediction, mapped) for prediction in run.predictions)


def _prediction(run, prediction, mapped):
    response, label = prediction["response"], prediction["label"]
    answer, text, verdict = "", prediction.get("error") or "", "failed"
    if response is not None:
        answer, text = parse_answer(response), response
        verdict = "right" if answer == label else "mapped" if mapped.get(answer) == label else "wrong"
    cells = (run.name, run.model, prediction["video"], label, answer, verdict)
    return (
        f'<tr class="{verdict}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + f'<td class="response">{escape(text)}</td></tr>\n'
    )


def _figure(width, height):
    # matplotlib's object interface: no display, no global state in a training process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
