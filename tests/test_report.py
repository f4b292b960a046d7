"""The report shows what was measured, works in a browser, asks for nothing and runs nothing that a model wrote."""

import base64
import http.server
import io
import json
import re
import shutil
import subprocess
import threading

import pytest
from PIL import Image

from open_r1.labels import CLASSES
from open_r1.metrics import score
from open_r1.report import COLUMNS, Run, draw_confusion_matrix, markdown_table, table_rows, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
FLAGS += ["--virtual-time-budget=5000"]  # ms the page may run for

ATTACK = "<script>document.title='taken'</script><img src=\"{url}\" onerror=\"document.title='taken'\"></td></table>"


def make_run(responses, dataset="dfew", fold=1, model="mine", labels=None):
    labels = labels or ["happy", "sad", "fear", "angry", "neutral"][: len(responses)]
    predictions = [
        {"video": f"clips/{number}.mp4", "label": label, "response": response, "error": "is empty; replace it"}
        for number, (label, response) in enumerate(zip(labels, responses, strict=True))
    ]
    metrics = score(labels, responses, CLASSES[dataset], resamples=50)
    return Run(model, dataset, metrics, predictions, fold)


def attacked_run(url="http://127.0.0.1:9/"):
    attack = ATTACK.format(url=url)
    return make_run(
        ["<think>He grins.</think>\n<answer>happy</answer>", "sorrowful", attack, None, "\ud800 | neutral"],
        model="<b>m</b> | x\ny",
    )


def browse(page, profile):
    """The page's DOM after its scripts have run."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def drive(page, script):
    """A copy of the page in which the test's own script may run after the page's."""
    text = page.read_text(encoding="utf-8")
    text, found = re.subn(r"<meta http-equiv=.*?>\n", "", text)
    assert found == 1
    copy = page.with_name("driven.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


@pytest.fixture
def server():
    """A local server that notes each path it is asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/image.png", asked
        listening.shutdown()
        thread.join()


def test_files_and_their_content(tmp_path):
    page = write_report(tmp_path / "out", [attacked_run(), make_run(["happy", "sad"], "ravdess", None)])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "confusion_matrix_1_dfew_fold_1.png",
        "confusion_matrix_2_ravdess.png",
        "per_class_1_dfew_fold_1.png",
        "per_class_2_ravdess.png",
        "report.html",
        "report.md",
    ]
    text = page.read_text(encoding="utf-8")
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(png) for png in embedded[:2]] == [
        (tmp_path / "out" / name).read_bytes() for name in (names[0], names[2])
    ]
    assert all(min(Image.open(io.BytesIO(base64.b64decode(png))).size) > 200 for png in embedded)
    assert "1 free-form answers that the label map understood" in text
    assert "<td>sorrowful</td><td>sad</td><td>1</td>" in text
    assert "is empty; replace it" in text
    again = write_report(tmp_path / "again", [attacked_run(), make_run(["happy", "sad"], "ravdess", None)])
    assert again.read_bytes() == page.read_bytes()


def test_nothing_a_model_wrote_is_markup(tmp_path):
    text = write_report(tmp_path, [attacked_run()]).read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "&lt;script&gt;" in text
    assert "<b>" not in text and "onerror=&quot;" in text
    assert re.findall(r"<img (?!alt=\"[a-z ]+\" src=\"data:image/png;base64,)", text) == []
    assert not re.search(r"<[^>]+(src|href)=\"(?!data:)", text)


def test_markdown_table_stands_beside_the_published_rows():
    runs = [make_run(["happy", "sad", "x", "angry"]), make_run(["happy", "happy", "x", None], fold=2), attacked_run()]
    table = markdown_table(table_rows(runs))
    lines = table.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(COLUMNS)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(COLUMNS) + 1 for line in lines)
    assert re.match(r"\| dfew fold 1 \| mine \| 4 \| 75\.00 \[\d+\.\d\d, 100\.00\] \| 75\.00 \[", lines[2])
    assert lines[3].startswith("| dfew fold 2 | mine | 4 | 25.00 [") and "| 1 counted as wrong |" in lines[3]
    assert lines[4].startswith("| dfew, mean of 2 folds | mine | 8 | 50.00 | 50.00 |")
    assert "&lt;b&gt;m&lt;/b&gt; \\| x y" in lines[5]
    assert "| dfew | R1-Omni (published) |  | 65.83 | 56.27 |  |  |  |  |" in lines
    assert sum("(published)" in line for line in lines) == 4 and "57.68" not in table


def test_the_confusion_matrix_is_dark_where_the_answers_are():
    matrix = {"rows": ["a", "b"], "columns": ["a", "b", "other"], "counts": [[9, 0, 1], [0, 0, 10]]}
    image = Image.open(io.BytesIO(draw_confusion_matrix(matrix))).convert("RGB")
    blue = [pixel for _, pixel in image.getcolors(1 << 20) if pixel[2] > 100 and pixel[0] < 60]
    assert blue, "no dark cell"
    empty = matrix | {"counts": [[0, 0, 0], [0, 0, 0]]}
    image = Image.open(io.BytesIO(draw_confusion_matrix(empty))).convert("RGB")
    assert not [pixel for _, pixel in image.getcolors(1 << 20) if pixel[2] > 100 and pixel[0] < 60]


@needs_chromium
def test_the_page_works_in_a_browser_and_asks_for_nothing(tmp_path, server):
    url, asked = server
    page = write_report(tmp_path / "out", [attacked_run(url)])
    dom = browse(page, tmp_path / "profile")
    assert "<title>Emotion recognition: evaluation</title>" in dom
    assert '<output id="shown">5 of 5</output>' in dom
    assert "&lt;script&gt;document.title='taken'&lt;/script&gt;" in dom
    assert asked == []

    bare = tmp_path / "bare.html"  # the same text as markup does both, so the assertions above can fail
    bare.write_text(f"<title>bare</title>{ATTACK.format(url=url)}")
    assert "<title>taken</title>" in browse(bare, tmp_path / "profile")
    assert asked == ["/image.png"]


@needs_chromium
def test_filter_and_images_in_a_browser(tmp_path):
    page = write_report(tmp_path / "out", [attacked_run()])
    driver = """
    const shown = () => rows.filter(row => row.offsetParent !== null).map(row => row.cells[2].textContent).join(" ");
    const steps = {};
    const type = text => { query.value = text; query.dispatchEvent(new Event("input")); };
    const choose = value => { verdict.value = value; verdict.dispatchEvent(new Event("change")); };
    steps.all = shown();
    type("GRINS happy"); steps.words = shown();
    type("<script>"); steps.markup = shown();
    type("nothing has this"); steps.none = shown();
    type("");
    for (const value of ["right", "mapped", "wrong", "failed"]) { choose(value); steps[value] = shown(); }
    choose(""); steps.again = shown();
    Promise.all([...document.images].map(image => image.decode())).then(() => {
      steps.images = [...document.images].filter(image => image.naturalWidth > 200).length;
      document.title = JSON.stringify(steps);
    });
    """
    title = re.search(r"<title>(.*?)</title>", browse(drive(page, driver), tmp_path / "profile"))[1]
    clips = " ".join(f"clips/{number}.mp4" for number in range(5))
    assert json.loads(title) == {
        "all": clips,
        "words": "clips/0.mp4",
        "markup": "clips/2.mp4",
        "none": "",
        "right": "clips/0.mp4",
        "mapped": "clips/1.mp4",
        "wrong": "clips/2.mp4 clips/4.mp4",
        "failed": "clips/3.mp4",
        "again": clips,
        "images": 2,
    }
