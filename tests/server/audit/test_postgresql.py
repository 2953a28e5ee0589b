"""The log in a real PostgreSQL, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from circuit_breakers.audit.store import AuditStore, TripFilter
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.audit.writer import AuditWriter
from circuit_breakers.errors import AuditError

from .entries import Counters, trace, trip

WAIT_S = 30


class Cluster:
    """A server of its own, on the loopback."""

    def __init__(self, root: Path, owner: str | None) -> None:
        self._data = root / "data"
        self._owner = owner
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._sockets = root
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._sockets}"
        log = self._data / "log"
        self._run("pg_ctl", "-D", self._data, "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-m", "immediate", "stop")

    def _run(self, *command: object) -> None:
        subprocess.run(
            [str(word) for word in command],
            user=self._owner,
            cwd=self._sockets,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("psycopg")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl on the PATH")
    owner = None
    if os.geteuid() == 0:
        # PostgreSQL does not run as root.
        try:
            owner = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    root = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    try:
        if owner is not None:
            shutil.chown(root, owner)
        cluster = Cluster(root, owner)
        cluster.start()
        yield cluster
        cluster.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def store(cluster: Cluster) -> Iterator[AuditStore]:
    store = AuditStore(cluster.url)
    yield store
    with store._database.writing(locked=False) as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS audit_log, score_traces")
    store.close()


def test_everything_comes_back_as_it_went_in(store: AuditStore) -> None:
    entry, kept = trip(score=0.1, detail="é\x00"), trace()
    store.append([entry])
    store.append([entry])
    store.add_traces([kept, kept])
    _, row = store.rows()
    assert {name: row[name] for name in entry.to_json()} == entry.normalised().to_json()
    assert list(store.traces(0)) == [kept]
    assert verify_rows(store.rows()).findings == ()
    page = store.trips(TripFilter(phase="completion", since_us=0), before_seq=None, limit=1)
    assert [row["entry_id"] for row in page.rows] == [entry.entry_id]


def test_several_writers_make_one_chain(cluster: Cluster, store: AuditStore) -> None:
    """4 stores that begin at once, as 4 processes on an empty database."""
    stores = [AuditStore(cluster.url) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=each: [s.append([trip()]) for _ in range(25)])
        for each in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = verify_rows(store.rows())
    assert (found.findings, found.num_rows) == ((), 101)
    for each in stores:
        each.close()


def test_pruning_and_tampering_show(store: AuditStore) -> None:
    store.append([trip(time_us=t) for t in (1, 2, 30)])
    with store._database.writing(locked=False) as connection:
        connection.exec_driver_sql("UPDATE audit_log SET score = score + 1e-9 WHERE seq = 3")
    assert [finding.seq for finding in verify_rows(store.rows()).findings] == [3]
    assert store.prune(2**62).num_entries == 4
    found = verify_rows(store.rows())
    assert (found.findings, found.pruned_through) == ((), 4)


def test_a_restart_of_the_server_loses_nothing(
    cluster: Cluster, store: AuditStore, tmp_path: Path
) -> None:
    counters = Counters()
    writer = AuditWriter(AuditStore(cluster.url), tmp_path / "spool", counters, last_retry_s=0.1)
    writer.start()
    entries = [trip() for _ in range(30)]
    for entry in entries[:10]:
        writer.record(entry)
    assert writer.drain(WAIT_S)
    cluster.stop()
    try:
        for entry in entries[10:]:
            writer.record(entry)
        assert writer.sync(WAIT_S)
        with pytest.raises(AuditError):
            store.append([trip()])
    finally:
        cluster.start()
    assert writer.drain(WAIT_S)
    writer.close()
    rows = [row for row in store.rows() if row["kind"] == "trip"]
    assert [row["entry_id"] for row in rows] == [entry.entry_id for entry in entries]
    assert counters.num_dropped == 0
