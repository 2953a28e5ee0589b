"""Ways to take the disk away from a server: none, full, or one on which no file may grow."""

from __future__ import annotations

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

__all__ = ["full", "nothing_written", "small_disk"]

_SIZE = "32m"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of its own under `folder`; false where only root may mount one."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    is_mounted = done.returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Its disk has no byte left."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as out:
            for size in (2**20, 4096, 1):
                _fill(out, size)
        yield
    finally:
        filler.unlink()


def _fill(out: RawIOBase, size: int) -> None:
    try:
        while True:
            out.write(b"x" * size)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise


@contextmanager
def nothing_written(pid: int) -> Iterator[None]:
    """No file takes a byte of the process (EFBIG), as its limit on the size of a file is 0."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
