"""Node's side of the tests: whether it is here, and the packages of a lock file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .fetched_packages import kept_folder

__all__ = ["installed", "npm", "require_node"]


def require_node(*minimum: int) -> None:
    """Skips the test where there is no npm, or no Node; or none of at least this version."""
    wanted = f"node {'.'.join(map(str, minimum))} or newer" if minimum else "node"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip(f"needs {wanted} and npm (Debian: apt-get install nodejs npm)")
    done = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    version = done.stdout.strip().removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) < minimum:
        pytest.skip(f"got node {version}, needs {wanted}")


def npm(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `npm` says in a directory."""
    environment = os.environ | {"NO_COLOR": "1"} | variables
    environment.pop("FORCE_COLOR", None)
    return subprocess.run(
        ["npm", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def installed(source: Path) -> Path:
    """A folder with `node_modules` of a package.json and its lock file, kept for further runs.

    Its script `unpack` has run there, with `unpacked` for temporary files. Skips the test where npm
    cannot fetch the packages.
    """

    def fill(folder: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, folder)
        done = npm(folder, "ci", "--no-audit", "--no-fund", "--ignore-scripts")
        if done.returncode:
            pytest.skip(f"npm cannot fetch the packages of {source}: {done.stderr[-300:]}")
        (folder / "unpacked").mkdir(exist_ok=True)
        done = npm(folder, "run", "unpack", TMPDIR=str(folder / "unpacked"))
        assert done.returncode == 0, done.stdout + done.stderr

    return kept_folder("npm", (source / "package-lock.json").read_bytes(), fill)
