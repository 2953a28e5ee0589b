"""The files that the server ships are what clients/console builds, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ..node import npm, require_node

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "clients" / "console"
BUILT = ROOT / "server" / "circuit_breakers" / "console"


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def test_a_new_build_has_the_bytes_that_are_shipped(tmp_path: Path) -> None:
    require_node(20, 19)
    copy = tmp_path / "elsewhere" / "console"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules"))
    fetched = npm(copy, "ci", "--no-audit", "--no-fund")
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch the packages of {SOURCE}: {fetched.stderr[-300:]}")
    out = tmp_path / "built"
    done = npm(copy, "run", "build", "--", "--outDir", str(out), "--emptyOutDir")
    assert done.returncode == 0, done.stdout + done.stderr
    new, shipped = files(out), files(BUILT)
    assert new.keys() == shipped.keys()
    changed = [name for name in new if new[name] != shipped[name]]
    assert not changed, "run `npm run build` in clients/console and commit what it writes"


@pytest.mark.parametrize("directory", [SOURCE, Path(__file__).parent], ids=["console", "tests"])
def test_no_registry_is_named(directory: Path) -> None:
    """Each registry serves the same bytes, which the digests in the lock file hold it to."""
    lock = (directory / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock
    assert "resolved" not in lock
    assert "registry" not in lock
