"""Node's side of the tests: whether it is here, and the packages of a lock file."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["installed", "npm", "require_node"]

_MIN_NODE = (20, 19)
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "circuit-breakers"


def require_node() -> None:
    """Skips the test where there is no Node that is new enough, or no npm."""
    wanted = ".".join(map(str, _MIN_NODE))
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip(f"needs node {wanted} or newer and npm (Debian: apt-get install nodejs npm)")
    done = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    version = done.stdout.strip().removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) < _MIN_NODE:
        pytest.skip(f"got node {version}, needs {wanted} or newer")


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
    digest = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()[:16]
    target = _CACHE / "test-tools" / f"npm-{digest}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(source / name, target)
            done = npm(target, "ci", "--no-audit", "--no-fund", "--ignore-scripts")
            if done.returncode:
                pytest.skip(f"npm cannot fetch the packages of {source}: {done.stderr[-300:]}")
            (target / "unpacked").mkdir(exist_ok=True)
            done = npm(target, "run", "unpack", TMPDIR=str(target / "unpacked"))
            assert done.returncode == 0, done.stdout + done.stderr
            (target / "complete").touch()
    return target
