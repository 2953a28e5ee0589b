"""The log in SQLite: one chain whoever writes, pages, and retention that leaves a chain."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from circuit_breakers.audit.chain import Head, Signer
from circuit_breakers.audit.database import parse_url, sqlite_url
from circuit_breakers.audit.store import AuditStore, TripFilter
from circuit_breakers.audit.tables import METADATA
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.errors import AuditError, ConfigError

from .entries import KEY, trace, trip, url, write_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def store(path: Path) -> Iterator[AuditStore]:
    store = AuditStore(url(path))
    yield store
    store.close()


def test_an_entry_comes_back_as_it_went_in(store: AuditStore) -> None:
    entry = trip(score=0.1, threshold=-3.25)
    head = store.append([entry])
    created, row = store.rows()
    assert (created["kind"], created["action"], created["seq"]) == ("checkpoint", "created", 1)
    assert row["seq"] == head.seq == 2
    assert {name: row[name] for name in entry.to_json()} == entry.to_json()


def test_an_entry_that_is_delivered_again_is_taken_once(store: AuditStore) -> None:
    first, second = trip(), trip()
    store.append([first])
    store.append([first, second, second])
    store.append([second])
    assert [row["entry_id"] for row in store.rows()][1:] == [first.entry_id, second.entry_id]
    assert verify_rows(store.rows()).findings == ()


def test_several_writers_make_one_chain(path: Path) -> None:
    """4 stores, as of 4 processes, 25 entries each, one by one."""
    stores = [AuditStore(url(path)) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=store: [s.append([trip()]) for _ in range(25)])
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = verify_rows(stores[0].rows())
    assert (found.findings, found.num_rows) == ((), 101)
    for store in stores:
        store.close()


def test_the_file_is_in_wal_mode_and_commits_reach_the_disk(store: AuditStore, path: Path) -> None:
    store.set_up()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    with store._database._engine.connect() as connection:
        # 2 is FULL.
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_the_file_is_for_its_owner_only_and_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "what? 100%.db"
    store = AuditStore(sqlite_url(path))
    store.append([trip()])
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        path.name + end: 0o600 for end in ("", "-wal", "-shm")
    }
    store.close()


def test_a_signed_log_is_not_gone_on_with_without_its_key(path: Path) -> None:
    write_log(path, 1, key=KEY)
    store = AuditStore(url(path))
    with pytest.raises(ConfigError, match=r"is signed.*--audit-key-file"):
        store.append([trip()])
    store.close()


def test_a_locked_database_is_an_error_and_takes_nothing(
    store: AuditStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuit_breakers.audit.database._BUSY_S", 0.05)
    store.set_up()
    impatient = AuditStore(url(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(AuditError, match="database is locked"):
        impatient.append([trip()])
    other.execute("ROLLBACK")
    other.close()
    assert len(list(store.rows())) == 1
    impatient.close()


def test_pages_follow_each_other_without_gap_or_double(store: AuditStore) -> None:
    store.append([trip(token_index=i) for i in range(7)])
    seen, cursor = [], None
    for _ in range(3):
        page = store.trips(TripFilter(), before_seq=cursor, limit=3)
        # What comes in meanwhile does not shift the pages.
        store.append([trip(token_index=99)])
        seen.append([row["token_index"] for row in page.rows])
        cursor = page.next_seq
    assert seen == [[6, 5, 4], [3, 2, 1], [0]]
    assert cursor is None


@pytest.mark.parametrize(
    ("which", "found"),
    [
        (TripFilter(), [4, 3, 2, 1]),
        (TripFilter(since_us=20), [4, 3, 2]),
        (TripFilter(until_us=20), [1]),
        (TripFilter(since_us=20, until_us=30), [2]),
        (TripFilter(key_id="alice"), [2, 1]),
        (TripFilter(policy="strict"), [3]),
        (TripFilter(phase="prompt"), [4]),
        (TripFilter(probe="q", key_id="bob"), [4]),
        (TripFilter(probe="' OR 1=1 --"), []),
    ],
)
def test_filters_select(store: AuditStore, which: TripFilter, found: list[int]) -> None:
    store.append(
        [
            trip(time_us=10, token_index=1, key_id="alice"),
            trip(time_us=20, token_index=2, key_id="alice"),
            trip(time_us=30, token_index=3, key_id="bob", policy="strict"),
            trip(time_us=40, token_index=4, key_id="bob", phase="prompt", probe="q"),
            trip(time_us=40, kind="admin", action="reload"),
        ]
    )
    page = store.trips(which, before_seq=None, limit=10)
    assert [row["token_index"] for row in page.rows] == found


def test_pruning_leaves_a_chain_that_says_so(path: Path) -> None:
    store = AuditStore(url(path), Signer([KEY]))
    store.append([trip(time_us=t) for t in (1, 2, 30, 3)])
    store.add_traces([trace(time_us=1), trace(time_us=40)])
    # Row 5 is as old, but came after one that stays.
    store._last = None
    with store._database.writing(locked=True) as connection:
        connection.exec_driver_sql("UPDATE audit_log SET time_us = 0 WHERE seq = 1")
    assert store.prune(10) == (3, 1)
    rows = list(store.rows())
    assert [row["seq"] for row in rows] == [4, 5, 6]
    assert rows[-1]["action"] == "pruned"
    found = verify_rows(rows, Signer([KEY]))
    assert (found.findings, found.pruned_through) == ((), 3)
    # Nothing old enough is left: nothing to write down.
    assert store.prune(10) == (0, 0)
    store.append([trip()])
    assert store.prune(2**62) == (4, 1)
    found = verify_rows(store.rows(), Signer([KEY]))
    assert (found.findings, found.num_rows, found.pruned_through) == ((), 1, 7)
    store.close()


def test_a_writer_notices_that_its_rows_are_gone(
    store: AuditStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = store.append([trip(), trip()])
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM audit_log WHERE seq = 3")
    db.close()
    store.append([trip()])
    assert f"cut off or rewritten: head={last}" in caplog.text
    (finding,) = verify_rows(store.rows()).findings
    assert f"up to {last}" in finding.problem


@pytest.mark.parametrize("into", ["moved", None])
def test_a_file_that_is_moved_or_removed_takes_nothing_with_it(
    store: AuditStore, path: Path, into: str | None
) -> None:
    """SQLite itself goes on writing to a file that has no name any more."""
    last = store.append([trip()])
    if into is None:
        path.unlink()
    else:
        path.rename(path.with_name(into))
    entry = trip()
    with pytest.raises(AuditError, match="moved, removed or replaced"):
        store.append([entry])
    store.append([entry])
    created, lost, row = store.rows()
    assert (created["action"], lost["action"], lost["detail"]) == (
        "created",
        "head_lost",
        str(last),
    )
    assert row["entry_id"] == entry.entry_id
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_database_that_comes_back_empty_gets_its_tables(store: AuditStore) -> None:
    store.append([trip()])
    with store._database.writing(locked=True) as connection:
        METADATA.drop_all(connection)
    with pytest.raises(AuditError, match="no such table"):
        store.append([trip()])
    store.append([trip()])
    assert [row["action"] for row in store.rows()] == ["created", "head_lost", "stopped"]


def test_making_the_file_again_does_not_let_go_of_its_lock(store: AuditStore, path: Path) -> None:
    """Closing any descriptor of a file drops the locks that its process has on it."""
    store.append([trip()])
    store._database.make_file()
    # SQLite's SHARED_FIRST and SHARED_SIZE (os.h): each connection in WAL mode has a lock there.
    attempt = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'r+b'), 6, 510, 2**30 + 2)"
    tried = subprocess.run([sys.executable, "-c", attempt], capture_output=True, check=False)
    assert b"BlockingIOError" in tried.stderr


def test_a_pruned_log_is_no_alarm(store: AuditStore, caplog: pytest.LogCaptureFixture) -> None:
    store.append([trip(time_us=1)])
    store.prune(2**62)
    store.append([trip()])
    assert caplog.text == ""
    assert verify_rows(store.rows()).findings == ()


def test_traces_are_taken_once_and_come_newest_first(store: AuditStore) -> None:
    old, new = trace(time_us=1, breaker="x"), trace(time_us=2)
    store.add_traces([old, new])
    store.add_traces([new])
    assert list(store.traces(0)) == [new, old]
    assert list(store.traces(2)) == [new]
    assert list(store.traces(0, breaker="x")) == [old]
    assert list(store.traces(0, limit=1)) == [new]
    assert store.prune_traces(2) == 1


def test_an_outage_says_where_and_hides_statement_and_values(tmp_path: Path) -> None:
    store = AuditStore(url(tmp_path))  # a folder is no database
    with pytest.raises(AuditError) as error:
        store.append([trip(detail="secret")])
    assert str(tmp_path) in str(error.value)
    assert "secret" not in str(error.value) and "INSERT" not in str(error.value)
    store.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "is not one"),
        ("postgresql://u:hidden@h:port/d", "is not one"),
        ("mysql://u:hidden@h/d", r"got audit URL 'mysql://u:\*\*\*@h/d'"),
        ("mysql://h/d?password=hidden", "got audit URL 'mysql://h/d',"),
        ("sqlite://", "expected a file"),
        ("sqlite:///:memory:", "expected a file"),
    ],
)
def test_urls_that_cannot_hold_a_log_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse_url(text)
    assert "hidden" not in str(error.value)


def test_a_missing_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        AuditStore(url(tmp_path / "none" / "audit.db"))


def test_looking_for_a_log_makes_none(store: AuditStore, path: Path) -> None:
    with pytest.raises(ConfigError, match="no audit log"):
        store.check_exists()
    assert not path.exists()
    store.set_up()
    store.check_exists()
    assert Head(1, next(store.rows())["hash"])
