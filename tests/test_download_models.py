"""scripts/download_models.sh against stand-ins for the two hubs that run on this machine."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from open_r1 import download_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 2**20  # the client writes a file in pieces of this size
WEIGHTS = os.urandom(25 * 2**20)
CONFIG = {
    "model_type": "HumanOmni_qwen2",
    "mm_vision_tower": "/home/somebody/siglip",
    "mm_audio_tower": "/home/somebody/whisper",
    "num_frames": 8,
    "note": "schön",
}
TOWER = {"config.json": b"{}", "model.safetensors": b"tower weights", "README.md": b"read me"}
REPOSITORIES = {
    "R1-Omni-0.5B": {
        "config.json": json.dumps(CONFIG, ensure_ascii=False).encode(),
        "merges.txt": b"a b\n",
        "model.safetensors": WEIGHTS,
        "training_args.bin": b"pickle",
        "checkpoint-5/config.json": b"{}",
    },
    "siglip-base-patch16-224": {**TOWER, "preprocessor_config.json": b"{}"},
    "whisper-large-v3": {
        **TOWER,
        "model.fp32-00001-of-00002.safetensors": b"twice the size",
        "model.safetensors.index.fp32.json": b"{}",
        "pytorch_model.bin": b"again",
        "flax_model.msgpack": b"and again",
    },
    "bert-base-uncased": {**TOWER, "vocab.txt": b"[PAD]\n", "coreml/model.mlmodel": b"other"},
}
OWNERS = {"siglip-base-patch16-224": "google", "whisper-large-v3": "openai", "bert-base-uncased": "google-bert"}
FETCHED = {
    "R1-Omni-0.5B": {"config.json", "merges.txt", "model.safetensors"},
    "siglip-base-patch16-224": {"config.json", "model.safetensors", "preprocessor_config.json"},
    "whisper-large-v3": {"config.json", "model.safetensors"},
    "bert-base-uncased": {"config.json", "model.safetensors", "vocab.txt"},
}


class Hub(ThreadingHTTPServer):
    """What both stand-ins share: files, a record of requests, and a fault in the sending of the large file.

    Attributes:
        fault: None; "cut" closes the connection once after 15 MB; "outage" does so and answers 503 from then on;
            "stall" stops sending after 15 MB and keeps the connection open.
        prefix: the path under which the hub answers, e.g. "/hf".
    """

    daemon_threads = True

    def __init__(self, handler, owner: str, prefix: str = ""):
        super().__init__(("127.0.0.1", 0), handler)
        self.files = {f"{OWNERS.get(name, owner)}/{name}": dict(files) for name, files in REPOSITORIES.items()}
        self.prefix, self.fault, self.cut_done = prefix, None, False
        self.sent: list[tuple[str, str | None]] = []  # (path of a file, Range header)
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.prefix}"

    def large_files_sent(self) -> list[str]:
        return [path for path, _ in self.sent if path.endswith("safetensors")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, body: bytes = b"", status: int = 200, length: int | None = None, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value, status: int = 200, **headers) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def send_file(self, path: str, content: bytes, **headers) -> None:
        """Sends a file or the range asked for, with the server's fault if it is the large one."""
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.server.sent.append((path, asked))
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups() if asked else (0, "")
        part = content[int(first) : int(last) + 1 if last else None]
        if asked:
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        faulty = self.command == "GET" and self.server.fault and len(content) == len(WEIGHTS)
        if faulty and self.server.cut_done and self.server.fault == "outage":
            self.answer(status=503)
        elif faulty and not self.server.cut_done:
            self.server.cut_done = True
            self.answer(part[: 15 * 2**20], 206 if asked else 200, length=len(part), **headers)
            if self.server.fault == "stall":
                self.server.closing.wait(60)
            self.close_connection = True
        else:
            self.answer(part, 206 if asked else 200, **headers)

    def do_HEAD(self):
        self.do_GET()


class HuggingFaceHandler(Handler):
    """The part of the Hugging Face Hub that the client asks; large files are redirected, as there."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if not path.startswith(self.server.prefix):
            return self.answer(status=404)
        path = path.removeprefix(self.server.prefix)
        if path.startswith("/cdn/"):
            _, _, owner, name, file = path.split("/", 4)
            return self.send_file(file, self.server.files[f"{owner}/{name}"][file])
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(resolve|tree|revision)/[^/]+/?(.*))?", path)
        repo_id, action, file = match.groups()
        if repo_id not in self.server.files:
            return self.answer_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files = self.server.files[repo_id]
        if action == "resolve":
            return self.resolve(repo_id, file, files[file])
        if action == "tree":
            return self.answer_json([{"type": "file", "path": n, **self.details(n, c)} for n, c in files.items()])
        siblings = [{"rfilename": name, **self.details(name, content)} for name, content in files.items()]
        return self.answer_json({"id": repo_id, "sha": COMMIT, "siblings": siblings})

    @staticmethod
    def details(name: str, content: bytes) -> dict:
        details = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        details["blobId"] = details["oid"]
        if name.endswith(("safetensors", "bin")):
            digest = hashlib.sha256(content).hexdigest()
            details["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        return details

    def resolve(self, repo_id: str, name: str, content: bytes) -> None:
        details = self.details(name, content)
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{details["oid"]}"'}
        if "lfs" in details:
            headers |= {"X_Linked_Size": str(len(content)), "X_Linked_Etag": f'"{details["lfs"]["sha256"]}"'}
            # another host name, as the real hub's content network has
            location = f"{self.server.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{repo_id}/{name}"
            return self.answer(status=302, Location=location, **headers)
        return self.send_file(name, content, **headers)


class ModelScopeHandler(Handler):
    """The part of ModelScope that its client asks."""

    def do_GET(self):
        url = urlsplit(self.path)
        match = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/repo(?:/files)?|/revisions)?", url.path)
        if match is None or match[1] not in self.server.files:
            return self.answer_json({"Code": 10010205001, "Success": False, "Message": "record not found"}, 404)
        files = self.server.files[match[1]]
        if match[2] == "/repo":
            name = parse_qs(url.query)["FilePath"][0]
            return self.send_file(name, files[name])
        if match[2] == "/repo/files":
            listed = [
                {"Path": n, "Name": n, "Type": "blob", "Size": len(c), "Sha256": hashlib.sha256(c).hexdigest()}
                for n, c in files.items()
                if "/" not in n
            ]
            return self.answer_json(
                {"Code": 200, "Success": True, "Data": {"Files": listed, "TotalCount": len(listed)}}
            )
        return self.answer_json({"Code": 200, "Success": True, "Data": {}})


@contextmanager
def serving(*arguments, **options):
    with Hub(*arguments, **options) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()


@pytest.fixture
def hub():
    with serving(HuggingFaceHandler, "StarJiaxing") as server:
        yield server


def command(tmp_path: Path, endpoint: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of a download into `tmp_path / "models"`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": endpoint,
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_CACHE": str(tmp_path / "ms"),
    }
    line = [sys.executable, "-m", "open_r1.download_models", "--output", str(tmp_path / "models"), *arguments]
    return line, environment


def run(tmp_path: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    line, environment = command(tmp_path, endpoint, *arguments)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def check_models(models: Path) -> None:
    """Everything needed is there, nothing else, and config.json names the towers beside the checkpoint."""
    for name, files in FETCHED.items():
        there = {path.name for path in (models / name).iterdir() if not path.name.startswith(".")}
        assert there == files, name
        for file in files - {"config.json"}:
            assert (models / name / file).read_bytes() == REPOSITORIES[name][file]
    config = json.loads((models / "R1-Omni-0.5B" / "config.json").read_text(encoding="utf-8"))
    assert config == CONFIG | {
        "mm_vision_tower": "siglip-base-patch16-224",
        "mm_audio_tower": "whisper-large-v3",
        "mm_bert": "bert-base-uncased",
    }


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The only `error:` line; the client's own retry messages may precede it, a traceback may not."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ") and result.stderr.count("error: ") == 1
    return last


def test_everything_is_fetched_once(tmp_path, hub):
    first = run(tmp_path, hub.endpoint)
    assert first.returncode == 0, first.stderr
    check_models(tmp_path / "models")
    assert "mm_vision_tower was '/home/somebody/siglip', is now 'siglip-base-patch16-224'" in first.stderr
    assert len(hub.large_files_sent()) == 4

    # older than any clock's grain, so that the client sees that config.json is not the one it wrote
    config = tmp_path / "models" / "R1-Omni-0.5B" / "config.json"
    os.utime(config, (config.stat().st_mtime + 60,) * 2)
    second = run(tmp_path, hub.endpoint)
    assert second.returncode == 0, second.stderr
    check_models(tmp_path / "models")
    assert len(hub.large_files_sent()) == 4


def test_new_weights_of_the_same_size_are_fetched(tmp_path, hub, monkeypatch):
    assert run(tmp_path, hub.endpoint).returncode == 0
    repository = "google/siglip-base-patch16-224"
    hub.files[repository]["model.safetensors"] = b"TOWER WEIGHTS"
    monkeypatch.setattr(sys.modules[__name__], "COMMIT", COMMIT[::-1])
    assert run(tmp_path, hub.endpoint).returncode == 0
    assert (tmp_path / "models" / repository.split("/")[1] / "model.safetensors").read_bytes() == b"TOWER WEIGHTS"


def test_a_cut_connection_is_taken_up_within_the_run(tmp_path, hub):
    hub.fault = "cut"
    result = run(tmp_path, hub.endpoint)
    assert result.returncode == 0, result.stderr
    check_models(tmp_path / "models")
    assert ("model.safetensors", f"bytes={CHUNK}-") in hub.sent


def test_the_next_run_continues_after_an_outage(tmp_path, hub):
    hub.fault = "outage"
    assert "answered 503 for StarJiaxing/R1-Omni-0.5B" in one_line_error(run(tmp_path, hub.endpoint))
    assert not (tmp_path / "models" / "R1-Omni-0.5B" / "model.safetensors").exists()

    hub.fault, hub.sent = None, []
    assert run(tmp_path, hub.endpoint).returncode == 0
    check_models(tmp_path / "models")
    assert hub.sent[0] == ("model.safetensors", f"bytes={CHUNK}-")


def test_the_next_run_continues_after_a_kill(tmp_path, hub):
    hub.fault = "stall"
    line, environment = command(tmp_path, hub.endpoint)
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(path.stat().st_size >= CHUNK for path in (tmp_path / "models").rglob("*.part")):
                break
            time.sleep(0.05)
        process.kill()

    hub.fault, hub.sent = None, []
    assert run(tmp_path, hub.endpoint).returncode == 0
    check_models(tmp_path / "models")
    assert hub.sent[0] == ("model.safetensors", f"bytes={CHUNK}-")


def test_a_damaged_part_is_not_kept(tmp_path, hub):
    """The whole file's sha256 is checked, so that bytes gone wrong in a part file do not become weights."""
    folder = tmp_path / "models" / "R1-Omni-0.5B" / ".cache"
    folder.mkdir(parents=True)
    (folder / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part").write_bytes(b"wrong bytes")
    assert run(tmp_path, hub.endpoint).returncode == 0
    check_models(tmp_path / "models")


def test_dry_run_lists_and_writes_nothing(tmp_path, hub):
    result = run(tmp_path, hub.endpoint, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "models").exists()
    assert hub.sent == []
    assert f"from {hub.endpoint}\n" in result.stdout
    assert f"openai/whisper-large-v3 -> {tmp_path}/models/whisper-large-v3  (2 files, 15 bytes)" in result.stdout
    assert "    model.safetensors  26.2 MB\n" in result.stdout
    assert "fp32" not in result.stdout


def test_a_mirror_under_a_path(tmp_path):
    with serving(HuggingFaceHandler, "StarJiaxing", prefix="/hf/mirror") as mirror:
        result = run(tmp_path, mirror.endpoint)
    assert result.returncode == 0, result.stderr
    check_models(tmp_path / "models")


def test_other_tower_ids(tmp_path, hub):
    hub.files["somebody/small-whisper"] = hub.files.pop("openai/whisper-large-v3")
    result = run(tmp_path, hub.endpoint, "--whisper-id", "somebody/small-whisper")
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "models" / "R1-Omni-0.5B" / "config.json").read_text(encoding="utf-8"))
    assert config["mm_audio_tower"] == "small-whisper"


def test_a_repository_with_bin_weights_only(tmp_path, hub):
    bert = hub.files["google-bert/bert-base-uncased"]
    bert["pytorch_model.bin"] = bert.pop("model.safetensors")
    result = run(tmp_path, hub.endpoint)
    assert result.returncode == 0, result.stderr
    assert "google-bert/bert-base-uncased has no safetensors; taking pytorch_model.bin instead" in result.stderr
    assert (tmp_path / "models" / "bert-base-uncased" / "pytorch_model.bin").read_bytes() == b"tower weights"


def test_sharded_weights_come_with_their_index():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    names = ["config.json", *shards, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert download_models.needed_files("a/b", names) == ["config.json", *shards]


@pytest.mark.parametrize(
    ("left_out", "message"), [("config.json", "holds no config.json"), ("model.safetensors", "holds no weights")]
)
def test_a_repository_that_is_no_model(tmp_path, hub, left_out, message):
    del hub.files["StarJiaxing/R1-Omni-0.5B"][left_out]
    assert f"StarJiaxing/R1-Omni-0.5B {message}" in one_line_error(run(tmp_path, hub.endpoint))


def test_a_missing_repository_is_named(tmp_path, hub):
    error = one_line_error(run(tmp_path, hub.endpoint, "--siglip-id", "google/nothing"))
    assert error.startswith(f"error: google/nothing is not on {hub.endpoint}")


def test_an_unknown_model_is_refused_before_any_request(tmp_path):
    error = one_line_error(run(tmp_path, "http://127.0.0.1:9", "--model", "R1-Omni-7B"))
    assert "'R1-Omni-7B'" in error
    assert all(model in error for model in download_models.MODELS)


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_no_network_is_one_line(tmp_path, arguments):
    with serving(HuggingFaceHandler, "StarJiaxing") as server:
        endpoint = server.endpoint  # a port where nothing listens any more once the server is gone
    error = one_line_error(run(tmp_path, endpoint, *arguments))
    assert f"cannot reach {endpoint}" in error
    assert "HF_ENDPOINT=" in error and "--source modelscope" in error


def test_no_network_does_not_pass_for_a_finished_download(tmp_path, hub):
    hub.fault = "outage"
    one_line_error(run(tmp_path, hub.endpoint))
    one_line_error(run(tmp_path, "http://127.0.0.1:9"))


def test_a_full_disk_is_seen_before_the_download(tmp_path):
    usage = download_models.shutil.disk_usage(tmp_path)
    whole = download_models.Repository("a/b", tmp_path / "b", "main", {"model.safetensors": usage.total * 2}, {})
    with pytest.raises(download_models.DownloadError, match="are still to be fetched; make room"):
        download_models.check_disk([whole], tmp_path / "not" / "there")


def test_an_output_that_is_a_file(tmp_path, hub):
    (tmp_path / "models").write_text("")
    error = one_line_error(run(tmp_path, hub.endpoint))
    assert f"cannot write to --output {tmp_path}/models" in error
    assert os.strerror(errno.ENOTDIR) in error or os.strerror(errno.EEXIST) in error


def test_help_is_quick(tmp_path):
    line, environment = command(tmp_path, "http://127.0.0.1:9", "--help")
    imported = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('open_r1.download_models')\n"
    imported += "finally: assert not {'torch', 'huggingface_hub', 'modelscope_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", imported], env=environment, check=True, capture_output=True)
    assert "--whisper-id" in subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout


def test_config_is_replaced_in_one_step(tmp_path, monkeypatch):
    """A kill before the last step leaves the old config.json whole."""
    checkpoint = tmp_path / "R1-Omni-0.5B"
    checkpoint.mkdir()
    before = json.dumps(CONFIG)
    (checkpoint / "config.json").write_text(before)

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        download_models.write_tower_paths(checkpoint, {"mm_bert": tmp_path / "bert-base-uncased"})
    assert (checkpoint / "config.json").read_text() == before


def test_modelscope(tmp_path):
    pytest.importorskip("modelscope_hub")
    with serving(ModelScopeHandler, "iic") as server:
        result = run(tmp_path, server.endpoint, "--source", "modelscope")
        assert result.returncode == 0, result.stderr
        check_models(tmp_path / "models")
        sent = len(server.large_files_sent())
        again = run(tmp_path, server.endpoint, "--source", "modelscope")
        missing = run(tmp_path, server.endpoint, "--source", "modelscope", "--bert-id", "google-bert/nothing")
    check_models(tmp_path / "models")
    assert again.returncode == 0, again.stderr
    assert len(server.large_files_sent()) == sent
    assert "google-bert/nothing is not on" in one_line_error(missing)


def test_modelscope_without_its_client(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert download_models.main(["--source", "modelscope", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --source modelscope needs its client; run: pip install modelscope_hub\n"
