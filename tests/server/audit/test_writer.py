"""Outages, a full disk and kill -9: nothing lost, nothing twice, and nobody waits."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from circuit_breakers.audit.store import AuditStore
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.audit.writer import AuditWriter

from .entries import Counters, trace, trip, url

WAIT_S = 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is held counts as away at once."""
    monkeypatch.setattr("circuit_breakers.audit.database._BUSY_S", 0.05)


class Site:
    """One database, one spool, and the writers on them."""

    def __init__(self, root: Path) -> None:
        self.database = root / "audit.db"
        self.spool = root / "spool"
        self.counters = Counters()
        self.writers: list[AuditWriter] = []

    def writer(self, *, max_in_memory: int = 10_000, trace_days: int | None = None) -> AuditWriter:
        writer = AuditWriter(
            AuditStore(url(self.database)),
            self.spool,
            self.counters,
            max_in_memory=max_in_memory,
            trace_days=trace_days,
            last_retry_s=0.05,
        )
        self.writers.append(writer)
        return writer

    def started(self) -> AuditWriter:
        writer = self.writer()
        writer.start()
        return writer

    def hold(self) -> sqlite3.Connection:
        """Locks the database, as an outage of it."""
        store = AuditStore(url(self.database), patient=True)
        store.set_up()
        store.close()
        holder = sqlite3.connect(self.database, isolation_level=None, timeout=WAIT_S)
        holder.execute("BEGIN EXCLUSIVE")
        return holder

    def trip_ids(self) -> list[str]:
        """Trips in the database, in order; the chain is whole."""
        store = AuditStore(url(self.database))
        rows = list(store.rows())
        store.close()
        assert verify_rows(rows).findings == ()
        return [row["entry_id"] for row in rows if row["kind"] == "trip"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for writer in site.writers:
        writer.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_entries_reach_the_database_in_order(site: Site) -> None:
    writer = site.started()
    entries = [trip() for _ in range(1200)]  # more than two batches
    for entry in entries:
        writer.record(entry)
    assert writer.drain(WAIT_S)
    assert site.trip_ids() == [entry.entry_id for entry in entries]
    assert writer.sequence == 1201  # and the log's first row
    assert writer.num_pending == 0


def test_an_outage_is_bridged_by_the_spool(site: Site) -> None:
    writer = site.started()
    holder = site.hold()
    entries = [trip() for _ in range(20)]
    for entry in entries:
        writer.record(entry)
    assert writer.sync(WAIT_S)
    assert not writer.drain(0.3)
    assert writer.num_pending == 20
    holder.execute("ROLLBACK")
    holder.close()
    assert writer.drain(WAIT_S)
    assert site.trip_ids() == [entry.entry_id for entry in entries]
    assert site.counters.num_dropped == 0


def test_what_a_closed_writer_could_not_deliver_the_next_one_does(site: Site) -> None:
    holder = site.hold()
    first = site.started()
    entry = trip()
    first.record(entry)
    assert first.sync(WAIT_S)
    first.close()
    assert first.num_pending == 1
    holder.execute("ROLLBACK")
    holder.close()
    second = site.started()
    later = trip()
    second.record(later)
    wait_until(lambda: len(site.trip_ids()) == 2)
    assert set(site.trip_ids()) == {entry.entry_id, later.entry_id}


def test_without_spool_and_database_memory_holds_what_fits_and_counts_the_rest(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    holder = site.hold()
    writer = site.writer(max_in_memory=5)
    site.spool.rmdir()
    writer.start()
    entries = [trip() for _ in range(8)]
    for entry in entries:
        writer.record(entry)
    assert (writer.num_pending, site.counters.num_dropped) == (5, 3)
    assert "entries are lost" in caplog.text or "wait in memory" in caplog.text
    holder.execute("ROLLBACK")
    holder.close()
    # The database takes them without a spool.
    assert writer.drain(WAIT_S)
    assert site.trip_ids() == [entry.entry_id for entry in entries[:5]]


def test_a_spool_that_works_again_is_used_again(site: Site) -> None:
    holder = site.hold()
    writer = site.writer()
    site.spool.rmdir()
    writer.start()
    writer.record(first := trip())
    assert not writer.sync(0.1)
    # Nobody waits for a disk that says no.
    assert writer.is_safe(writer.num_recorded)
    site.spool.mkdir()
    writer.record(second := trip())
    assert writer.sync(WAIT_S)
    holder.execute("ROLLBACK")
    holder.close()
    assert writer.drain(WAIT_S)
    assert site.trip_ids() == [first.entry_id, second.entry_id]


def test_what_is_lost_at_the_end_is_counted(site: Site) -> None:
    holder = site.hold()
    writer = site.writer()
    site.spool.rmdir()
    writer.start()
    writer.record(trip())
    writer.close()
    assert site.counters.num_dropped == 1
    holder.close()


def test_what_comes_when_nobody_writes_any_more_is_counted(site: Site) -> None:
    """After the end, or after the death of the thread that spools."""
    writer = site.started()
    writer.close()
    writer.record(trip())
    assert site.counters.num_dropped == 1
    assert writer.num_pending == 0


def test_a_damaged_line_of_the_spool_is_counted_and_the_rest_delivered(site: Site) -> None:
    holder = site.hold()
    first = site.started()
    first.record(trip(probe="zebra"))
    first.record(kept := trip())
    first.close()
    holder.close()
    (file,) = site.spool.glob("*.spool")
    file.write_bytes(file.read_bytes().replace(b"zebra", b"horse"))
    site.started()
    wait_until(lambda: site.trip_ids() == [kept.entry_id])
    wait_until(lambda: site.counters.num_dropped == 1)


def kill_at_work(site: Site, *, held: bool) -> list[str]:
    """Ids of the entries that a process had on the disk before it was killed.

    Args:
        held: the database is held to the end; otherwise the kill falls into a delivery.
    """
    script = Path(__file__).with_name("killed_writer.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(site.database), str(site.spool)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = process.stdout
    try:
        ids = [lines.readline().strip() for _ in range(20)]
        holder = site.hold()
        ids += [lines.readline().strip() for _ in range(20)]
        if not held:
            holder.close()
            ids += [lines.readline().strip() for _ in range(20)]
    finally:
        os.kill(process.pid, signal.SIGKILL)
    ids += lines.read().split()
    lines.close()
    process.wait()
    holder.close()
    return ids


def test_killed_processes_lose_nothing_and_write_nothing_twice(site: Site) -> None:
    killed = [kill_at_work(site, held=held) for held in (True, False)]
    on_disk = [entry_id for ids in killed for entry_id in ids]
    assert "dropped" not in on_disk and len(on_disk) >= 40 + 60
    site.started()
    wait_until(lambda: set(on_disk) <= set(site.trip_ids()))
    delivered = site.trip_ids()
    assert len(delivered) == len(set(delivered))
    # The last entry of each may be on the disk although its process could not say so any more.
    assert len(delivered) <= len(on_disk) + len(killed)
    for ids in killed:
        assert [entry_id for entry_id in delivered if entry_id in set(ids)] == ids


def test_traces_are_written_and_old_ones_taken_out(site: Site) -> None:
    old, new = trace(time_us=1), trace()
    store = AuditStore(url(site.database))
    store.add_traces([old])
    writer = site.writer(trace_days=1)
    writer.start()
    writer.trace(new)
    wait_until(lambda: list(store.traces(0)) == [new])
    store.close()


def test_traces_that_do_not_fit_are_counted_and_entries_are_not_held_up(site: Site) -> None:
    writer = site.writer(max_in_memory=2)
    for _ in range(3):
        writer.trace(trace())
    assert (site.counters.num_traces_dropped, site.counters.num_dropped) == (1, 0)
    writer.start()
    writer.record(trip())
    assert writer.drain(WAIT_S)
    assert len(site.trip_ids()) == 1
