"""Prometheus's programs and nginx: from the PATH, else from Debian's packages, without root.

A machine without both is told so by a skip; one with apt where that fails is told by an error.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["find_program"]

# By upstream's name: Debian's package, and its path below usr there.
_DEBIAN = {
    "promtool": ("prometheus", "bin/promtool"),
    "prometheus": ("prometheus", "bin/prometheus"),
    "amtool": ("prometheus-alertmanager", "bin/amtool"),
    "alertmanager": ("prometheus-alertmanager", "bin/prometheus-alertmanager"),
    "nginx": ("nginx", "sbin/nginx"),
}


# Alertmanager of Debian reads its template from here; the other is as long, and relative.
_ABSOLUTE = b"/usr/share/prometheus/alertmanager"
_RELATIVE = b"usr/share//prometheus/alertmanager"


def find_program(name: str) -> Path:
    """Path of a program of `_DEBIAN`; skips the test where there is none.

    Start it in the folder above its usr/bin: that is where alertmanager looks for usr/share.
    """
    package, debian_path = _DEBIAN[name]
    for candidate in (name, Path(debian_path).name):
        found = shutil.which(candidate)
        if found:
            return Path(found)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"needs {name} on the PATH, or apt to fetch Debian's package {package}")
    return _unpacked(package) / "usr" / debian_path


def _unpacked(package: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "circuit-breakers"
    target = cache / "test-tools" / package
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                tree = Path(work) / "tree"
                _run(["dpkg-deb", "-x", str(_download(package, Path(work))), str(tree)], Path(work))
                for program in (tree / "usr").glob("bin/*"):
                    program.write_bytes(program.read_bytes().replace(_ABSOLUTE, _RELATIVE))
                tree.rename(target)
    return target


def _download(package: str, work: Path) -> Path:
    try:
        _run(["apt-get", "-q", "download", package], work)
    except RuntimeError:
        # No package lists, as in fresh containers, and only root may fetch the system's.
        own = ["-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
        (work / "lists" / "partial").mkdir(parents=True)
        (work / "cache" / "archives" / "partial").mkdir(parents=True)
        _run(["apt-get", "-q", *own, "update"], work)
        _run(["apt-get", "-q", *own, "download", package], work)
    (deb,) = work.glob("*.deb")
    return deb


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr[-2000:]}")
