"""The TypeScript client's own tests, against the server that the Python client's tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..node import npm, require_node
from .conftest import Guarded

SOURCE = Path(__file__).parents[2] / "clients" / "typescript"


def test_no_registry_is_named() -> None:
    """Each registry serves the same bytes, which the digests in the lock file hold it to."""
    lock = (SOURCE / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock
    assert "resolved" not in lock
    assert "registry" not in lock


def test_npm_test_passes(guarded: Guarded, tmp_path: Path) -> None:
    require_node(20)
    copy = tmp_path / "typescript"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    for command in (("ci", "--no-audit", "--no-fund"), ("test",)):
        done = npm(copy, *command, **guarded.environment())
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Test Files  6 passed (6)" in done.stdout, done.stdout[-3000:]
