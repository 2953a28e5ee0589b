"""dev.py where it can be tested without installing 2 GB; the rest of it installs every CI run."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).parents[1] / "dev.py"


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module that works on an empty folder with a copy of the input files."""
    spec = importlib.util.spec_from_file_location("dev", DEV)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((DEV.parent / name).read_bytes())
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "circuit-breakers.stamp",
        "UNFINISHED": venv / "circuit-breakers.unfinished",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_unknown_command_exits_2_and_lists_the_commands() -> None:
    done = subprocess.run([sys.executable, DEV, "srve"], capture_output=True, text=True)
    assert done.returncode == 2
    known = "serve, test, lint, docs, train, gate, setup, clean"
    assert f"got command 'srve', expected {known}" in done.stdout


def test_help_shows_every_command() -> None:
    done = subprocess.run([sys.executable, DEV], capture_output=True, text=True, check=True)
    for command in ("serve", "test", "lint", "docs", "train", "gate", "setup", "clean"):
        assert f"python3 dev.py {command}" in done.stdout


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_platforms_are_told_the_cure(
    system: str, machine: str, dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(SystemExit, match=f"got {system} on {machine}, expected Linux on x86_64"):
        dev.check_platform()


def test_other_pythons_are_told_the_cure(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setenv("PATH", "")  # no other Python to hand over to
    with pytest.raises(SystemExit, match=r"expected 3\.11, 3\.12 or 3\.13"):
        dev.check_platform()


def test_finished_environment_is_left_alone(dev: ModuleType) -> None:
    dev.VENV.mkdir()
    dev.STAMP.write_text(dev.expected_stamp())
    dev.ensure_environment()
    assert [p.name for p in dev.VENV.iterdir()] == ["circuit-breakers.stamp"]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/constraints-cpu.txt", "dev.py"])
def test_stamp_follows_each_input(name: str, dev: ModuleType) -> None:
    before = dev.expected_stamp()
    with (dev.ROOT / name).open("a") as file:
        file.write("\n")
    assert dev.expected_stamp() != before


@pytest.mark.parametrize("trouble", ["unfinished", "moved", "no python"])
def test_broken_environment_is_removed_before_installing(
    trouble: str, dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dev.VENV / "bin").mkdir(parents=True)
    (dev.VENV / "leftover").touch()
    if trouble != "no python":
        dev.PYTHON.symlink_to(sys.executable)
    dev.STAMP.write_text(
        "0 /elsewhere/.venv\n" if trouble == "moved" else dev.expected_stamp().replace(" ", "0 ")
    )
    if trouble == "unfinished":
        dev.UNFINISHED.touch()
    # Too little space stops it after the removal and before anything is installed.
    monkeypatch.setattr(dev, "MIN_FREE_BYTES", 2**80)
    with pytest.raises(SystemExit, match="GB free at"):
        dev.ensure_environment()
    assert not dev.VENV.exists()
