"""Downloads a released checkpoint and its three towers and writes the towers' local paths into its config.json."""

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

MODELS = ("R1-Omni-0.5B", "HumanOmni-0.5B", "EMER-SFT-0.5B", "MAFW-DFEW-0.5B")
OWNERS = {"huggingface": "StarJiaxing", "modelscope": "iic"}
# What a reader of configurations, tokenizers and preprocessors may ask for; weights are chosen apart.
SMALL_FILES = ("*.json", "*.txt", "*.jinja")
# Names of the weights, best first. A repository often holds the same weights several times (fp32, other frameworks).
WEIGHTS = (
    ("model.safetensors",),
    ("model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


class DownloadError(Exception):
    """A name, a folder, the network or a hub stands in the way; one line that names it and the mend.

    No `humanomni.errors` class, because importing that package imports torch: `--help` would take seconds.
    """


@dataclass(frozen=True)
class Repository:
    """One repository, the folder it goes to and the files of it that are needed.

    Attributes:
        revision: the commit to fetch; the branch where the hub does not tell commits.
        files: size in bytes by name.
        sha256: hex digest by name, of the files for which the hub tells it (its large ones).
    """

    repo_id: str
    folder: Path
    revision: str
    files: dict[str, int]
    sha256: dict[str, str]

    def missing(self) -> dict[str, int]:
        """Size by name of the files that are not in the folder at their full size."""
        return {name: size for name, size in self.files.items() if not self._is_here(name, size)}

    def _is_here(self, name: str, size: int) -> bool:
        path = self.folder / name
        # config.json alone may differ from the hub's: the towers' paths are written into it
        return path.is_file() and (name == "config.json" or path.stat().st_size == size)


class HuggingFace:
    """The Hugging Face Hub, or the mirror that HF_ENDPOINT names."""

    def __init__(self):
        from huggingface_hub import constants

        self.endpoint = constants.ENDPOINT

    def look_up(self, repo_id: str, folder: Path) -> Repository:
        from huggingface_hub import HfApi

        with self._clear_errors(repo_id):
            info = HfApi().model_info(repo_id, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings}
        names = needed_files(repo_id, listed)
        return Repository(
            repo_id=repo_id,
            folder=folder,
            revision=info.sha,
            files={name: listed[name].size for name in names},
            sha256={name: listed[name].lfs.sha256 for name in names if listed[name].lfs is not None},
        )

    def fetch(self, repository: Repository) -> None:
        from huggingface_hub import snapshot_download

        with self._clear_errors(repository.repo_id):
            for name in repository.missing():
                if name in repository.sha256:
                    self._fetch_large(repository, name)
            # finds the large files in place, checks their sha256 and fetches the rest
            snapshot_download(
                repository.repo_id,
                revision=repository.revision,
                local_dir=repository.folder,
                allow_patterns=list(repository.files),
            )

    def _fetch_large(self, repository: Repository, name: str) -> None:
        """Fetches one file, continuing where an interrupted run stopped (`snapshot_download` starts anew)."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        size = repository.files[name]
        part = repository.folder / ".cache" / f"{repository.sha256[name]}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with part.open("ab") as file:
            http_get(
                hf_hub_url(repository.repo_id, name, revision=repository.revision),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=name,
            )
        os.replace(part, repository.folder / name)

    @contextlib.contextmanager
    def _clear_errors(self, repo_id: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )

        try:
            yield
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"{repo_id} is not on {self.endpoint}, or needs a login; check its name, or run `hf auth login`"
            ) from error
        except HfHubHTTPError as error:
            raise DownloadError(
                f"{self.endpoint} answered {error.response.status_code} for {repo_id}; run the same command again to "
                "continue, or set HF_ENDPOINT to a mirror"
            ) from error
        except HFValidationError as error:
            raise DownloadError(f"{repo_id!r} is no repository id; it should read owner/name") from error
        except OfflineModeIsEnabled as error:
            raise DownloadError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be fetched; unset it") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, LocalEntryNotFoundError) as error:
            raise DownloadError(
                f"cannot reach {self.endpoint} for {repo_id} ({type(error).__name__}); check the network, set "
                "HF_ENDPOINT=https://<mirror> or pass --source modelscope; the same command then continues"
            ) from error


class ModelScope:
    """ModelScope, through its own client, which continues interrupted files by itself."""

    def __init__(self):
        try:
            from modelscope_hub import HubApi, HubConfig
        except ImportError as error:
            raise DownloadError("--source modelscope needs its client; run: pip install modelscope_hub") from error
        self._api = HubApi()
        self.endpoint = HubConfig().endpoint

    def look_up(self, repo_id: str, folder: Path) -> Repository:
        with self._clear_errors(repo_id):
            sizes = {file.path: file.size for file in self._api.list_repo_files(repo_id, "model", recursive=False)}
        names = needed_files(repo_id, sizes)
        return Repository(repo_id, folder, "master", {name: sizes[name] for name in names}, sha256={})

    def fetch(self, repository: Repository) -> None:
        with self._clear_errors(repository.repo_id):
            self._api.download_repo(
                repository.repo_id,
                "model",
                revision=repository.revision,
                local_dir=repository.folder,
                allow_patterns=list(repository.files),
            )

    @contextlib.contextmanager
    def _clear_errors(self, repo_id: str) -> Iterator[None]:
        from modelscope_hub import HubError, NotExistError
        from requests import RequestException

        try:
            yield
        except NotExistError as error:
            raise DownloadError(
                f"{repo_id} is not on {self.endpoint}; name another by --siglip-id, --whisper-id or --bert-id, or "
                "pass --source huggingface"
            ) from error
        except (HubError, RequestException) as error:
            raise DownloadError(
                f"{self.endpoint} does not give {repo_id} ({type(error).__name__}); check the network or pass "
                "--source huggingface; the same command then continues"
            ) from error


def needed_files(repo_id: str, names: list[str]) -> list[str]:
    """The files of a repository that the loader reads: configurations, tokenizer and one copy of the weights.

    Raises:
        DownloadError: the repository holds no config.json or no weights.
    """
    top = sorted(name for name in names if "/" not in name)
    if "config.json" not in top:
        raise DownloadError(f"{repo_id} holds no config.json, so it is no model; check its name")
    small = [n for n in top if any(fnmatch(n, p) for p in SMALL_FILES) and not fnmatch(n, "*.index*.json")]
    for patterns in WEIGHTS:
        weights = [name for name in top if any(fnmatch(name, pattern) for pattern in patterns)]
        if weights:
            if patterns[0].endswith(".bin"):
                print(f"{repo_id} has no safetensors; taking {', '.join(weights)} instead", file=sys.stderr)
            return small + weights
    raise DownloadError(f"{repo_id} holds no weights (model.safetensors or pytorch_model.bin); check its name")


def write_tower_paths(checkpoint: Path, towers: dict[str, Path]) -> None:
    """Writes the towers' folders, relative to the checkpoint's parent, into its config.json, in one step.

    Args:
        towers: folder by field of config.json.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DownloadError(f"{path} is not JSON ({error}); delete it and run the same command again") from error
    for field, folder in towers.items():
        value = Path(os.path.relpath(folder, checkpoint.parent)).as_posix()
        if config.get(field) != value:
            print(f"{path}: {field} was {config.get(field)!r}, is now {value!r}", file=sys.stderr)
            config[field] = value
    temporary = path.with_name("config.json.tmp")
    temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def describe(repository: Repository, every_file: bool) -> None:
    files = repository.files
    print(f"{repository.repo_id} -> {repository.folder}  ({len(files)} files, {readable(sum(files.values()))})")
    if every_file:
        for name, size in files.items():
            print(f"    {name}  {readable(size)}")


def readable(size: float) -> str:
    """A number of bytes for people, e.g. 3.09 GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def check_disk(repositories: list[Repository], output: Path) -> None:
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free, needed = (
        shutil.disk_usage(existing).free,
        sum(sum(repository.missing().values()) for repository in repositories),
    )
    if needed > free:
        raise DownloadError(
            f"--output {output} has {readable(free)} free and {readable(needed)} are still to be fetched; make room "
            "or name another folder by --output"
        )


def download(arguments: argparse.Namespace) -> None:
    hub = HuggingFace() if arguments.source == "huggingface" else ModelScope()
    model = f"{OWNERS[arguments.source]}/{arguments.model}"
    towers = {
        "mm_vision_tower": arguments.siglip_id,
        "mm_audio_tower": arguments.whisper_id,
        "mm_bert": arguments.bert_id,
    }
    output = arguments.output.expanduser()
    folders = {repo_id: output / repo_id.rpartition("/")[2] for repo_id in (model, *towers.values())}

    print(f"from {hub.endpoint}")
    repositories = [hub.look_up(repo_id, folder) for repo_id, folder in folders.items()]
    for repository in repositories:
        describe(repository, every_file=arguments.dry_run)
    check_disk(repositories, output)
    if arguments.dry_run:
        return
    for repository in repositories:
        hub.fetch(repository)
        for name in repository.missing():
            raise DownloadError(f"{repository.folder / name} is incomplete; run the same command again")
    write_tower_paths(folders[model], {field: folders[repo_id] for field, repo_id in towers.items()})
    print(f"{folders[model]} is ready; next: python inference.py --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download_models",
        description="Download a released checkpoint and its three towers (about 6 GB), and write the towers' local "
        "paths into the checkpoint's config.json. An interrupted download continues when run again.",
        epilog="environment: HF_ENDPOINT names a mirror of the Hugging Face Hub, HF_TOKEN logs in; "
        "MODELSCOPE_ENDPOINT does the former for ModelScope.",
    )
    parser.add_argument("--model", default=MODELS[0], help=f"one of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("models"), help="parent folder (default: %(default)s)")
    parser.add_argument("--source", choices=OWNERS, default="huggingface", help="the hub (default: %(default)s)")
    towers = parser.add_argument_group("towers", "repository ids; on ModelScope they may bear another owner's name")
    towers.add_argument("--siglip-id", metavar="ID", default="google/siglip-base-patch16-224", help="%(default)s")
    towers.add_argument("--whisper-id", metavar="ID", default="openai/whisper-large-v3", help="%(default)s")
    towers.add_argument("--bert-id", metavar="ID", default="google-bert/bert-base-uncased", help="%(default)s")
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched and fetch nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after an error of the user's or the network's, 130 after an interrupt."""
    arguments = parse(argv)
    try:
        if arguments.model not in MODELS:
            raise DownloadError(f"--model {arguments.model!r} is unknown; the models are {', '.join(MODELS)}")
        download(arguments)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        print(f"error: cannot write to --output {arguments.output}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
