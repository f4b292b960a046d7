"""The installation files agree with each other, and a second run of setup.sh costs nothing."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def pinned_version(name: str) -> str:
    (specifier,) = PINS[canonicalize_name(name)].specifier
    assert specifier.operator == "=="
    return specifier.version


def project_files() -> list[Path]:
    """Every file of the project that git tracks or would offer to add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def copied_project(tmp_path: Path) -> Path:
    """A folder with what setup.sh reads, so that a test cannot touch the environment it runs in."""
    for name in ("setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = ("VENV", "EXTRAS", "PYTHON")
    inherited = {name: value for name, value in os.environ.items() if name not in settings}
    inherited["TMPDIR"] = str(folder)
    return subprocess.run(
        ["bash", str(folder / "setup.sh")], env=inherited | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("extras", ["", "test"])
def test_setup_has_nothing_to_do_the_second_time(extras):
    stamp = Path(sys.prefix) / ".r1-omni-installed"
    if not stamp.exists():
        pytest.skip(f"{sys.prefix} was not made by setup.sh")
    checksum, installed = stamp.read_text().splitlines()
    if "test" not in installed.split(","):
        pytest.skip(f"{sys.prefix} was installed by setup.sh without the extra that holds the tests' packages")
    files = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT, check=True, capture_output=True, text=True
    )
    if checksum != f"{files.stdout.strip()} {ROOT}":
        pytest.skip("pyproject.toml or constraints.txt changed since; run bash scripts/test.sh")
    start = time.monotonic()
    result = setup(ROOT, VENV=sys.prefix, EXTRAS=extras)
    assert result.returncode == 0, result.stderr
    assert "up to date" in result.stdout
    assert time.monotonic() - start < 2


def test_setup_refuses_a_folder_that_is_no_environment(tmp_path):
    project = copied_project(tmp_path)
    (project / "thesis").mkdir()
    (project / "thesis" / "chapter.tex").write_text("years of work")
    result = setup(project, VENV="thesis")
    assert result.returncode == 1
    assert "VENV=thesis is a folder but no virtual environment" in result.stderr
    assert (project / "thesis" / "chapter.tex").exists()


def test_setup_names_a_python_it_cannot_use(tmp_path):
    result = setup(copied_project(tmp_path), PYTHON="/bin/false")
    assert result.returncode == 1
    assert "PYTHON=/bin/false is not a working Python 3.11 or 3.12" in result.stderr


def test_setup_tells_what_to_install_where_there_is_no_python(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "comm", "dirname", "ls", "mktemp", "rm", "sed", "sort", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = setup(copied_project(tmp_path), PATH=str(tools))
    assert result.returncode == 1
    assert "no Python 3.11 or 3.12 found; install one" in result.stderr


def test_setup_shows_why_pip_failed_and_starts_again_the_next_time(tmp_path):
    """An index without packages stands for a machine without a network."""
    project = copied_project(tmp_path)
    for _ in range(2):
        result = setup(project, PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
        assert result.returncode == 1
        assert "ERROR: " in result.stderr and "setuptools" in result.stderr
        assert "set PIP_INDEX_URL" in result.stderr
        assert "done" not in result.stdout
        assert not (project / ".venv" / ".r1-omni-installed").exists()


@pytest.mark.parametrize("group", ["runtime", *EXTRAS])
def test_pins_lie_within_the_ranges(group):
    for text in PROJECT["dependencies"] if group == "runtime" else EXTRAS[group]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name in PINS:
            assert requirement.specifier.contains(pinned_version(name)), text
        else:
            assert group not in ("runtime", "test"), f"constraints.txt does not pin {text}"


def test_the_environment_holds_the_tested_set():
    if not (Path(sys.prefix) / ".r1-omni-installed").exists():
        pytest.skip(f"{sys.prefix} was not made by setup.sh")
    direct = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["test"]]]
    installed = {requirement.name: version(requirement.name) for requirement in direct}
    # a local build label, as in 2.14.1+cpu, belongs to the same release
    assert {name: v.partition("+")[0] for name, v in installed.items()} == {n: pinned_version(n) for n in installed}


def test_constraints_are_releases_for_every_user():
    assert len(PINS) > 50
    for requirement in PINS.values():
        assert requirement.url is None and not requirement.extras
        assert "+" not in str(requirement.specifier), f"{requirement} is a build of one machine"
        assert requirement.marker is None or requirement.marker.evaluate(default_environment())


def test_the_project_is_installed_with_both_packages(tmp_path):
    try:
        version("r1-omni")
    except PackageNotFoundError:
        pytest.skip("r1-omni runs from its source folder; run bash setup.sh")
    found = "from importlib.util import find_spec as f; print(*[f(n).origin for n in ('humanomni', 'open_r1')])"
    shown = subprocess.run([sys.executable, "-c", found], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout.split() == [str(ROOT / "humanomni/__init__.py"), str(ROOT / "src/open_r1/__init__.py")]


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e ."]
    (python,) = [e for e in environment["dependencies"] if isinstance(e, str) and e.startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_commits_are_checked_by_the_pinned_ruff():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]:
        assert hook["additional_dependencies"] == [f"ruff=={pinned_version('ruff')}"]


def test_ci_runs_what_a_user_runs():
    commands = [
        line
        for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["exec bash scripts/test.sh"]


def test_shell_scripts_parse_and_stop_at_errors():
    scripts = [path for path in project_files() if path.suffix == ".sh" or path == ROOT / ".ci/run"]
    assert ROOT / "setup.sh" in scripts
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "set -euo pipefail" in script.read_text(encoding="utf-8"), script


def test_no_file_names_a_folder_of_one_machine():
    """Such a path works for nobody else; the release had one in 28 places."""
    words = re.compile("|".join(f"(?<![\\w.~}}]){word}" for word in ("/wor" + "k/", "/roo" + "t/", "/mn" + "t/data")))
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a clip or weights
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in words.finditer(text)]
    assert not found
