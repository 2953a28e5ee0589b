"""Plain files in a directory: listed without links, read, written durably, renamed into place."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

from circuit_breakers.errors import ArtifactError

__all__ = ["list_files", "publish", "read_file", "write_atomically", "write_files"]


def list_files(root: Path) -> set[str]:
    """Relative POSIX paths of all files under `root`; anything but plain files is refused."""
    files: set[str] = set()
    pending = [root]
    while pending:
        try:
            entries = list(pending.pop().iterdir())
        except OSError as e:
            raise ArtifactError(
                f"cannot list {root} ({e}), expected a breaker directory; check the path"
            ) from e
        for entry in entries:
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                pending.append(entry)
            elif stat.S_ISREG(mode):
                files.add(entry.relative_to(root).as_posix())
            else:
                kind = "a symlink" if stat.S_ISLNK(mode) else "a special file"
                raise ArtifactError(
                    f"{entry}: got {kind}, expected only plain files and directories; "
                    "copy the breaker with its links resolved (cp -RL)"
                )
    return files


def read_file(path: Path) -> bytes:
    """The bytes of `path`; ArtifactError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise ArtifactError(
            f"cannot read {path} ({e.strerror}), expected a readable file; check that it is there"
        ) from e


def write_files(root: Path, contents: Mapping[str, bytes]) -> None:
    """Create directory `root` with `contents` by relative POSIX path, flushed to the disk."""
    root.mkdir()
    directories = {root}
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        directories.update(p for p in path.parents if p.is_relative_to(root))
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for directory in directories:
        _fsync_directory(directory)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there, even after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _fsync_directory(path.parent)


def publish(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there is moved away first and removed last."""
    old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex[:8]}")
    replaced = out.exists() or out.is_symlink()
    try:
        if replaced:
            out.rename(old)
        partial.rename(out)
    except OSError as e:
        if replaced and old.exists() and not out.exists():
            old.rename(out)
        raise ArtifactError(f"cannot put {out} in its place ({e}); choose another place") from e
    _fsync_directory(out.parent)
    if replaced:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
