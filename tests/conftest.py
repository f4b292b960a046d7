"""Fixtures that several test files share."""

import os
from pathlib import Path

# Tiny models are several times faster without threads that wait for each other; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def golden_folder() -> Path:
    """Where the record of the released code lies: $R1_OMNI_GOLDEN, or `shared/golden` beside the repository."""
    return Path(os.environ.get("R1_OMNI_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The folder of the golden record; tests that need it skip where it is absent."""
    folder = golden_folder()
    if not folder.is_dir():
        pytest.skip(f"no golden record at {folder}; set R1_OMNI_GOLDEN")
    return folder


@pytest.fixture(scope="session")
def golden(golden_root) -> Path:
    """The public set of the golden record."""
    return golden_root / "setA"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A self-contained, untrained checkpoint in the release's format."""
    from humanomni.tiny import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
