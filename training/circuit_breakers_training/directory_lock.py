"""Lets one process at a time work on a directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from circuit_breakers.errors import CircuitBreakersError

__all__ = ["beside", "locked"]


@contextmanager
def locked(directory: Path, taken: CircuitBreakersError) -> Iterator[None]:
    """Holds `directory`, which need not exist, until the end of the block or of this process.

    The kernel drops the lock when a process dies, however it dies. The lock is a file beside the
    directory, which the holder removes at the end.

    Raises:
        taken: another process holds the directory.
    """
    path = beside(directory, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken from None
            if not _is_at(path, file):
                # The last holder removed it after it was opened here: the next will lock a new one.
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def beside(directory: Path, suffix: str) -> Path:
    """The hidden path next to `directory`, behind any link, with `suffix` after its name."""
    directory = directory.resolve()
    return directory.with_name(f".{directory.name}{suffix}")


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
