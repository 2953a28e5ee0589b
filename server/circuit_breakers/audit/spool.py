"""Spool: entries on their way to the database, in a local file that outlives the process.

    abc123... {"entry_id": ...}     one line an entry: checksum, space, JSON; fsync after each batch

Every entry goes through it, whether the database answers or not, so an outage takes no other path.
A file belongs to the process that holds its lock; one without a lock was left by a process that
died, and the next one adopts it. Delivering a line twice is harmless: its entry has an id.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from circuit_breakers.audit.entry import AuditEntry
from circuit_breakers.errors import ConfigError

__all__ = ["Spool", "SpoolBatch", "make_spool_dir"]

logger = logging.getLogger(__name__)

_SUFFIX = ".spool"
_CHECKSUM_DIGITS = 16
_READ_BYTES = 256 * 1024
_MAX_BYTES = 1024**3
"""Two million entries; an outage that long is a full disk soon."""


class SpoolBatch(NamedTuple):
    """The oldest entries of a spool."""

    entries: list[AuditEntry]
    num_bytes: int
    damaged: list[bytes]
    """Lines that are no longer what was written."""

    @property
    def num_damaged(self) -> int:
        return len(self.damaged)


class Spool:
    """One file, appended to by one thread and emptied by another."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._fd = descriptor
        self._lock = threading.Lock()
        self._start = 0
        """Bytes that are delivered."""
        self._end = os.fstat(descriptor).st_size

    @classmethod
    def create(cls, folder: Path) -> Spool:
        """A spool of this process's own.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_folder(folder)
        except OSError:
            # Another process took it for one that was left; it will take it away.
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    @classmethod
    def orphans(cls, folder: Path) -> Iterator[Spool]:
        """The spools that dead processes have left; they are the caller's now."""
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                # A link would have whatever it points to emptied.
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                # Adopted and emptied by another process in between, or no spool.
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_nlink:
                yield cls(path, descriptor)
            else:
                os.close(descriptor)

    @property
    def is_empty(self) -> bool:
        return self._start == self._end

    def count(self) -> int:
        """Entries that are not delivered; reads the file."""
        # In pieces: after a long outage it does not fit into memory.
        pieces = range(self._start, self._end, _READ_BYTES)
        return sum(
            os.pread(self._fd, min(_READ_BYTES, self._end - at), at).count(b"\n") for at in pieces
        )

    def append(self, entries: Sequence[AuditEntry]) -> None:
        """Writes entries down; on return they are on the disk.

        Raises:
            OSError: none counts as written.
        """
        data = b"".join(_line(entry) for entry in entries)
        with self._lock:
            if self._end + len(data) > _MAX_BYTES:
                raise OSError(f"spool {self._path} is full: {self._end} bytes")
            done = 0
            while done < len(data):
                # At its place, over whatever a failed attempt has left there.
                done += os.pwrite(self._fd, data[done:], self._end + done)
            os.ftruncate(self._fd, self._end + len(data))
            os.fsync(self._fd)
            self._end += len(data)

    def peek(self, max_entries: int) -> SpoolBatch:
        """The oldest entries that are not delivered; they stay until `delivered`.

        Raises:
            OSError: the file cannot be read.
        """
        data = os.pread(self._fd, min(self._end - self._start, _READ_BYTES), self._start)
        *lines, rest = data.split(b"\n")
        entries: list[AuditEntry] = []
        damaged: list[bytes] = []
        num_bytes = 0
        for line in lines[:max_entries]:
            num_bytes += len(line) + 1
            entry = _entry_or_none(line)
            if entry is None:
                damaged.append(line)
            else:
                entries.append(entry)
        if not lines:
            # A line that was being written when its process died: no entry was promised yet.
            num_bytes = len(rest)
        return SpoolBatch(entries, num_bytes, damaged)

    def delivered(self, batch: SpoolBatch) -> None:
        """The batch is in the database; its damaged lines are kept in a file beside the spool."""
        if batch.damaged:
            self._keep(batch.damaged)
        with self._lock:
            self._start += batch.num_bytes
            if self._start == self._end:
                os.ftruncate(self._fd, 0)
                self._start = self._end = 0

    def close(self) -> None:
        """Lets go of the file, and takes it away if nothing waits in it."""
        if self.is_empty:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _keep(self, damaged: list[bytes]) -> None:
        path = self._path.with_suffix(".damaged")
        logger.error("%d damaged lines in %s, kept in %s", len(damaged), self._path, path)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, 0o600), "ab") as out:
                out.writelines(line + b"\n" for line in damaged)
        except OSError as e:
            # They must not hold up the entries behind them.
            logger.error("damaged lines of %s are lost: %s", self._path, e)


def make_spool_dir(folder: Path) -> None:
    """Makes the folder, for its owner only.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"audit spool {str(folder)!r}: {e.strerror}; give a folder that can be written to with "
            "--audit-spool"
        ) from e


def _line(entry: AuditEntry) -> bytes:
    body = json.dumps(entry.normalised().to_json(), separators=(",", ":")).encode("ascii")
    return _checksum(body) + b" " + body + b"\n"


def _entry_or_none(line: bytes) -> AuditEntry | None:
    checksum, _, body = line.partition(b" ")
    if checksum != _checksum(body):
        return None
    try:
        return AuditEntry(**json.loads(body))
    except (TypeError, ValueError):
        # Written by another version, with other fields.
        return None


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_CHECKSUM_DIGITS].encode("ascii")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
