"""Whatever is done to the database, verification finds it, and finds nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breakers.audit.chain import (
    HASHED_FIELDS,
    Head,
    Signer,
    checkpoint_detail,
    digest,
    linked,
)
from circuit_breakers.audit.verification import Verification, verify_rows

from .entries import KEY, trip, write_log

NUM_ROWS = 9
"""The log's first row and 8 trips."""

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEQ = st.integers(1, NUM_ROWS)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "audit.db"
    write_log(path, NUM_ROWS - 1, key=KEY)
    return path


class Forger:
    """Somebody with write access to the database, here a copy of it, and without the key."""

    def __init__(self, log: Path) -> None:
        self.db = sqlite3.connect(":memory:")
        self.db.row_factory = sqlite3.Row
        original = sqlite3.connect(log)
        original.backup(self.db)
        original.close()

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.db.execute("SELECT * FROM audit_log ORDER BY seq")]

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.db.execute("DELETE FROM audit_log")
        for row in rows:
            marks = ",".join("?" * len(row))
            self.db.execute(
                f"INSERT INTO audit_log ({','.join(row)}) VALUES ({marks})", list(row.values())
            )

    def verify(self, *, key: bytes | None = None, head: Head | None = None) -> Verification:
        rows = self.rows()
        self.db.close()
        return verify_rows(rows, Signer([key]) if key else None, head)


def newest(log: Path) -> Head:
    """The head of the untouched log."""
    head = Forger(log).verify().head
    assert head is not None
    return head


def chained_anew(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with numbers and digests that fit, as anybody can work them out."""
    prev_hash = "0" * 64
    for seq, row in enumerate(rows, 1):
        row |= {"seq": seq, "prev_hash": prev_hash}
        row["hash"] = prev_hash = digest(row)
    return rows


def places(found: Verification) -> set[int | None]:
    return {finding.seq for finding in found.findings}


def test_an_untouched_log_is_whole(log: Path) -> None:
    found = Forger(log).verify(key=KEY)
    assert found.findings == ()
    assert (found.num_rows, found.num_signed, found.pruned_through) == (NUM_ROWS, NUM_ROWS, 0)
    assert found.head is not None and found.head.seq == NUM_ROWS


@FEW
@given(seq=SEQ, data=st.data())
def test_a_changed_field_is_found_at_its_row(log: Path, seq: int, data: st.DataObject) -> None:
    forger = Forger(log)
    column = data.draw(st.sampled_from([*(set(HASHED_FIELDS) - {"seq"}), "hash", "mac"]))
    old = forger.rows()[seq - 1][column]
    value = data.draw(
        st.one_of(st.text(max_size=5), st.integers(-9, 9), st.floats(-2, 2)).filter(
            # A column of numbers reads "1" as 1, one of text 1 as "1".
            lambda v: str(v) != str(old) and v != old
        )
    )
    try:
        forger.db.execute(f"UPDATE audit_log SET {column} = ? WHERE seq = ?", (value, seq))
    except (sqlite3.IntegrityError, UnicodeEncodeError):
        # The table itself refuses a second row after the same one.
        assert forger.verify(key=KEY).findings == ()
        return
    changed = forger.rows()[seq - 1][column] != old
    assert (seq in places(forger.verify(key=KEY))) == changed


@FEW
@given(seqs=st.sets(SEQ, min_size=1, max_size=NUM_ROWS - 1))
def test_deleted_rows_are_found(log: Path, seqs: set[int]) -> None:
    head = newest(log)
    forger = Forger(log)
    for seq in seqs:
        forger.db.execute("DELETE FROM audit_log WHERE seq = ?", (seq,))
    found = forger.verify(key=KEY, head=head)
    # A run of them is one finding, at its first row.
    runs = {s for s in seqs if s - 1 not in seqs}
    assert runs <= places(found)
    assert all("missing" in finding.problem for finding in found.findings)


@FEW
@given(pair=st.lists(SEQ, min_size=2, max_size=2, unique=True))
def test_two_rows_that_changed_places_are_both_found(log: Path, pair: list[int]) -> None:
    forger = Forger(log)
    rows = forger.rows()
    first, second = pair
    for name in set(rows[0]) - {"seq"}:
        a, b = rows[first - 1], rows[second - 1]
        a[name], b[name] = b[name], a[name]
    forger.rewrite(rows)
    found = forger.verify()
    problems = {finding.seq: finding.problem for finding in found.findings}
    assert problems[first] == f"holds what was written as row {second}"
    assert problems[second] == f"holds what was written as row {first}"


@FEW
@given(seq=SEQ, fits=st.booleans())
def test_a_row_that_was_put_in_is_found(log: Path, seq: int, fits: bool) -> None:
    forger = Forger(log)
    rows = forger.rows()
    before = Head(seq - 1, rows[seq - 1]["prev_hash"])
    (forged,) = linked([trip()], before, None)
    rows.insert(seq - 1, forged)
    for number, row in enumerate(rows, 1):
        row["seq"] = number
    forger.rewrite(chained_anew(rows) if fits else without_doubles(rows))
    # Digests that fit are no use without the key.
    assert min(s for s in places(forger.verify(key=KEY)) if s) <= seq + 1


def without_doubles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table takes each prev_hash once; the forger has to change the one behind."""
    seen: set[str] = set()
    for row in rows:
        while row["prev_hash"] in seen:
            row["prev_hash"] = f"{int(row['prev_hash'], 16) + 1:064x}"
        seen.add(row["prev_hash"])
    return rows


@FEW
@given(seq=st.integers(1, NUM_ROWS - 1))
def test_a_row_with_a_digest_of_its_own_shows_in_the_row_behind(log: Path, seq: int) -> None:
    forger = Forger(log)
    rows = forger.rows()
    rows[seq - 1]["key_id"] = "someone-else"
    rows[seq - 1]["hash"] = digest(rows[seq - 1])
    forger.rewrite(rows)
    (finding,) = forger.verify().findings
    assert finding.seq == seq + 1
    assert finding.problem == f"does not follow row {seq}; one of the two was replaced"


def test_a_chain_that_was_made_anew_shows_with_a_key_only(log: Path) -> None:
    def forged() -> Forger:
        forger = Forger(log)
        rows = forger.rows()
        del rows[4]
        forger.rewrite(chained_anew(rows))
        return forger

    assert forged().verify().findings == ()
    found = forged().verify(key=KEY)
    assert places(found) == {5, 6, 7, 8}  # every row from the missing one on
    assert "has a signature of no key that was given" in found.findings[0].problem


def test_signatures_that_were_taken_off_show(log: Path) -> None:
    forger = Forger(log)
    forger.db.execute("UPDATE audit_log SET mac = NULL")
    found = forger.verify(key=KEY)
    assert [f.problem for f in found.findings] == ["a key was given, and no row is signed"]
    forger = Forger(log)
    forger.db.execute("UPDATE audit_log SET mac = NULL WHERE seq > 6")
    assert places(forger.verify(key=KEY)) == {7, 8, 9}


def test_rows_from_before_the_key_are_vouched_for_by_the_first_that_is_signed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.db"
    write_log(path, 3)
    write_log(path, 2, key=KEY)
    found = Forger(path).verify(key=KEY)
    assert (found.findings, found.num_rows, found.num_signed) == ((), 6, 2)
    forger = Forger(path)
    rows = forger.rows()
    rows[1]["probe"] = "other"
    forger.rewrite(chained_anew(rows))
    assert {5, 6} <= places(forger.verify(key=KEY))


def test_rows_cut_off_at_the_end_show_against_a_head_from_before(log: Path) -> None:
    head = newest(log)

    def cut(**how: Any) -> Verification:
        forger = Forger(log)
        forger.db.execute("DELETE FROM audit_log WHERE seq > 7")
        return forger.verify(key=KEY, **how)

    # What no chain can show by itself.
    assert cut().findings == ()
    assert [str(f) for f in cut(head=head).findings] == ["row 8: is missing, with all up to row 9"]


def test_a_head_of_another_log_is_found(log: Path) -> None:
    found = Forger(log).verify(head=Head(4, "0" * 64))
    assert places(found) == {4}


def test_a_head_that_was_pruned_vouches_for_nothing_but_what_follows_it() -> None:
    """Somebody cuts rows off, writes others and says that the rows with the head were pruned."""
    rows = linked([trip() for _ in range(6)], None, None)
    real = Head(4, rows[3]["hash"])
    forged = linked([trip() for _ in range(5)], None, None)
    last = Head(5, forged[4]["hash"])
    told = trip(kind="checkpoint", action="pruned", detail=checkpoint_detail(last))
    late = linked([told], last, None)
    assert verify_rows(late).findings == ()
    (finding,) = verify_rows(late, expected_head=real).findings
    assert str(finding) == "row 4: is the head that was given, and pruned; give a later one"
    assert places(verify_rows(late, expected_head=Head(5, rows[4]["hash"]))) == {5}
    # The chain goes on from this one.
    assert verify_rows(late, expected_head=last).findings == ()


def test_an_emptied_log_is_found(log: Path) -> None:
    forger = Forger(log)
    forger.db.execute("DELETE FROM audit_log")
    found = forger.verify()
    assert "the log is empty" in found.findings[0].problem
    assert found.head is None


def test_a_log_that_begins_late_needs_the_word_of_a_checkpoint(log: Path) -> None:
    forger = Forger(log)
    forger.db.execute("DELETE FROM audit_log WHERE seq < 4")
    found = forger.verify()
    assert [str(f) for f in found.findings] == ["row 1: is missing, with all up to row 3"]


def drop_seq(row: dict[str, Any]) -> None:
    row["seq"] = "three"


def drop_hash(row: dict[str, Any]) -> None:
    row["hash"] = None


@pytest.mark.parametrize("spoil", [drop_seq, drop_hash])
def test_rows_of_the_wrong_type_are_findings_and_no_crash(
    spoil: Callable[[dict[str, Any]], None],
) -> None:
    rows = linked([trip(), trip(), trip()], None, None)
    spoil(rows[2])
    assert verify_rows(rows).findings
