"""The TypeScript client's own tests, against the server that the Python client's tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Guarded

SOURCE = Path(__file__).parents[2] / "clients" / "typescript"
_MIN_NODE = 20


def missing() -> str | None:
    """Why the tests cannot run here; None when they can."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return f"node and npm are not installed; install Node {_MIN_NODE} or newer"
    done = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(done.stdout.removeprefix("v").split(".")[0]) < _MIN_NODE:
        return f"got Node {done.stdout.strip()}, expected {_MIN_NODE} or newer"
    return None


def test_no_registry_is_named() -> None:
    """Each registry serves the same bytes, which the digests in the lock file hold it to."""
    lock = (SOURCE / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock
    assert "resolved" not in lock
    assert "registry" not in lock


def test_npm_test_passes(guarded: Guarded, tmp_path: Path) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    copy = tmp_path / "typescript"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    environment = os.environ | guarded.environment() | {"NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "test"]):
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Test Files  6 passed (6)" in done.stdout, done.stdout[-3000:]
