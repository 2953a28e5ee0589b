"""The spool keeps what it was given, whatever happens to the process or to the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from circuit_breakers.audit.spool import Spool, make_spool_dir
from circuit_breakers.errors import ConfigError

from .entries import trip


def abandoned(spool: Spool) -> None:
    """As a killed process leaves it: without its lock."""
    os.close(spool._fd)


def test_entries_come_out_in_order_and_once(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    entries = [trip(token_index=i, detail="é") for i in range(5)]
    spool.append(entries[:3])
    spool.append(entries[3:])
    assert spool.count() == 5
    first = spool.peek(2)
    assert spool.peek(2) == first
    spool.delivered(first)
    rest = spool.peek(10)
    assert first.entries + rest.entries == entries
    assert (first.num_damaged, rest.num_damaged) == (0, 0)
    spool.delivered(rest)
    assert spool.is_empty
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 0
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_what_waits_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "spool"
    make_spool_dir(folder)
    spool = Spool.create(folder)
    (file,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    spool.close()


def test_a_file_without_a_living_owner_is_adopted_once(tmp_path: Path) -> None:
    dead, alive = Spool.create(tmp_path), Spool.create(tmp_path)
    entry = trip()
    dead.append([entry])
    alive.append([trip()])
    abandoned(dead)
    (adopted,) = Spool.orphans(tmp_path)
    assert adopted.peek(10).entries == [entry]
    assert list(Spool.orphans(tmp_path)) == []
    adopted.delivered(adopted.peek(10))
    adopted.close()
    alive.close()
    assert len(list(tmp_path.iterdir())) == 1  # the living one still holds an entry


def test_a_link_is_no_spool(tmp_path: Path) -> None:
    """A shared folder may be writable to others, as Kubernetes' emptyDir is."""
    precious = tmp_path / "policies.toml"
    precious.write_text("default = 'a'\n")
    (tmp_path / "1.spool").symlink_to(precious)
    assert list(Spool.orphans(tmp_path)) == []


def test_a_line_that_was_cut_off_while_written_is_no_entry(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    whole = trip()
    spool.append([whole, trip()])
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    abandoned(spool)
    file.write_bytes(data[:-20])
    (adopted,) = Spool.orphans(tmp_path)
    batch = adopted.peek(10)
    assert (batch.entries, batch.num_damaged) == ([whole], 0)
    adopted.delivered(batch)
    rest = adopted.peek(10)
    assert (rest.entries, rest.num_damaged) == ([], 0)
    adopted.delivered(rest)
    assert adopted.is_empty
    adopted.close()


def test_a_damaged_line_is_counted_and_kept_and_holds_nothing_up(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    before, after = trip(), trip()
    spool.append([before, trip(probe="zebra"), after])
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    abandoned(spool)
    file.write_bytes(data.replace(b"zebra", b"horse"))
    (adopted,) = Spool.orphans(tmp_path)
    batch = adopted.peek(10)
    assert (batch.entries, batch.num_damaged) == ([before, after], 1)
    # While the database is away the same batch is looked at again and again.
    assert adopted.peek(10) == batch
    adopted.delivered(batch)
    kept = file.with_suffix(".damaged")
    assert kept.read_bytes().count(b"horse") == 1
    assert kept.stat().st_mode & 0o777 == 0o600
    adopted.close()


def test_a_damaged_line_that_cannot_be_kept_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool.create(tmp_path)
    spool.append([trip(probe="zebra"), trip()])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b"zebra", b"horse"))
    file.with_suffix(".damaged").symlink_to("/dev/full")
    spool.delivered(spool.peek(10))
    assert spool.is_empty
    assert "damaged lines" in caplog.text and "No space left" in caplog.text
    spool.close()


def test_a_large_spool_is_counted_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuit_breakers.audit.spool._READ_BYTES", 1000)
    spool = Spool.create(tmp_path)
    spool.append([trip() for _ in range(10)])
    sizes = []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or read(fd, size, at))
    assert spool.count() == 10
    assert max(sizes) <= 1000
    spool.delivered(spool.peek(10))
    spool.close()


def test_a_full_disk_leaves_what_was_written_before(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    kept = trip()
    spool.append([kept])
    (file,) = tmp_path.iterdir()
    writable = spool._fd
    # The kernel's own full disk.
    spool._fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(OSError, match=r"No space left|Illegal seek|Invalid argument"):
        spool.append([trip()])
    os.close(spool._fd)
    spool._fd = writable
    late = trip()
    spool.append([late])
    assert spool.peek(10).entries == [kept, late]
    assert file.read_bytes().count(b"\n") == 2
    spool.delivered(spool.peek(10))
    spool.close()


def test_a_spool_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuit_breakers.audit.spool._MAX_BYTES", 1000)
    spool = Spool.create(tmp_path)
    with pytest.raises(OSError, match="is full"):
        spool.append([trip() for _ in range(10)])
    assert spool.is_empty
    spool.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--audit-spool"):
        make_spool_dir(tmp_path / "file" / "spool")
