"""What only some tests want, fetched once into the cache and not into the environment."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from circuit_breakers.models import cache_dir

__all__ = ["fetched_packages", "kept_folder"]

_REQUIREMENTS = Path(__file__).parents[1] / "requirements"
_CONSTRAINTS = _REQUIREMENTS / "constraints-cpu.txt"


def fetched_packages(name: str) -> Path:
    """Folder with what requirements/NAME.txt lists, and nothing that it depends on.

    Skips the test where they cannot be had.
    """
    requirements = _REQUIREMENTS / f"{name}.txt"
    wanted = requirements.read_bytes()
    if f"-c {_CONSTRAINTS.name}".encode() in wanted:
        wanted += _CONSTRAINTS.read_bytes()

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run(
            [*command, "--target", str(folder), "-r", str(requirements)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"requirements/{name}.txt cannot be fetched: {done.stderr[-300:]}")

    return kept_folder(name, wanted, fill)


def kept_folder(name: str, wanted: bytes, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled once for all runs that want the same.

    Args:
        wanted: what decides the folder's content.
        fill: may be called again after it failed, with what it left there.
    """
    folder = cache_dir() / "test-tools" / f"{name}-{hashlib.sha256(wanted).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            fill(folder)
            (folder / "complete").touch()
    return folder
