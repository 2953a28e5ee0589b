"""The walk through the chain that finds what was changed, taken out or put elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from circuit_breakers.audit.chain import GENESIS, HEAD_LOST, Head, Signer, checkpoint_detail, digest

__all__ = ["Finding", "Verification", "verify_rows"]

_MAX_COMPARED = 200
"""Altered rows of which each is looked for in the place of another; the first ones."""


class Finding(NamedTuple):
    """Something wrong with the log."""

    seq: int | None
    """The row; None for the log as a whole."""
    problem: str

    def __str__(self) -> str:
        return self.problem if self.seq is None else f"row {self.seq}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a walk through the log has found."""

    num_rows: int
    num_signed: int
    head: Head | None
    pruned_through: int
    """Rows up to this one were taken out by pruning, which a checkpoint tells; 0 without."""
    findings: tuple[Finding, ...]


def verify_rows(
    rows: Iterable[Mapping[str, Any]],
    signer: Signer | None = None,
    expected_head: Head | None = None,
) -> Verification:
    """Walks through the chain from its first row.

    Args:
        rows: in order of `seq`.
        signer: checks the signatures; None leaves them out.
        expected_head: a head from before, which the log must still hold.
    """
    walk = _Walk(signer, expected_head)
    for row in rows:
        walk.step(row)
    return walk.end()


class _Walk:
    def __init__(self, signer: Signer | None, expected_head: Head | None) -> None:
        self._signer = signer
        self._expected_head = expected_head
        self._findings: list[Finding] = []
        self._altered: list[dict[str, Any]] = []
        self._num_rows = 0
        self._num_signed = 0
        self._first: Head | None = None
        """Head of what is missing before the first row."""
        self._head: Head | None = None
        self._checkpoints: set[str] = set()
        self._met_head = False

    def step(self, row: Mapping[str, Any]) -> None:
        seq, row_hash = row["seq"], row["hash"]
        self._num_rows += 1
        if type(seq) is not int or not isinstance(row_hash, str):
            self._findings.append(Finding(None, f"a row has number {seq!r} and hash {row_hash!r}"))
            return
        before = self._head
        if before is None:
            self._first = Head(seq - 1, row["prev_hash"])
        elif seq != before.seq + 1:
            self._find_gap(before.seq, seq)
        is_sound = _digest_or_none(row) == row_hash
        if not is_sound:
            if len(self._altered) < _MAX_COMPARED:
                self._altered.append(dict(row))
            else:
                self._find(seq, "was changed")
        elif before is not None and seq == before.seq + 1 and row["prev_hash"] != before.hash:
            self._find(seq, f"does not follow row {before.seq}; one of the two was replaced")
        self._check_signature(row)
        if is_sound and row["kind"] == "checkpoint":
            self._checkpoints.add(str(row["detail"]))
            if row["action"] == HEAD_LOST:
                self._find(seq, f"says that the log lost rows while in use, up to {row['detail']}")
        if self._expected_head is not None and seq == self._expected_head.seq:
            self._met_head = True
            if row_hash != self._expected_head.hash or not is_sound:
                self._find(seq, "is not the row of the head that was given")
        self._head = Head(seq, row_hash)

    def end(self) -> Verification:
        first, expected = self._first, self._expected_head
        pruned_through = 0
        if first is None:
            self._findings.append(
                Finding(None, "the log is empty; its first row is written when it is made")
            )
        elif first.seq == 0 and first.hash != GENESIS:
            self._find(1, "is not the first row of a log")
        elif first.seq > 0:
            if checkpoint_detail(first) in self._checkpoints:
                pruned_through = first.seq
            else:
                self._find_gap(0, first.seq + 1)
        last_seq = self._head.seq if self._head is not None else 0
        if expected is not None and not self._met_head:
            if expected.seq > last_seq:
                self._find_gap(last_seq, expected.seq + 1)
            elif expected.seq <= pruned_through and expected != first:
                # Whoever cuts the end off could tell of a pruning that goes beyond the head.
                self._find(expected.seq, "is the head that was given, and pruned; give a later one")
        if self._signer is not None and self._num_rows and not self._num_signed:
            self._findings.append(Finding(None, "a key was given, and no row is signed"))
        self._find_altered()
        self._findings.sort(key=lambda finding: (finding.seq is not None, finding.seq or 0))
        return Verification(
            num_rows=self._num_rows,
            num_signed=self._num_signed,
            head=self._head,
            pruned_through=pruned_through,
            findings=tuple(self._findings),
        )

    def _check_signature(self, row: Mapping[str, Any]) -> None:
        if row["mac"] is None:
            # Rows from before there was a key are vouched for by the first that is signed.
            if self._num_signed:
                self._find(row["seq"], "is not signed, and a row before it is")
            return
        self._num_signed += 1
        if self._signer is not None and not self._signer.accepts(row["hash"], row["mac"]):
            self._find(row["seq"], "has a signature of no key that was given")

    def _find_altered(self) -> None:
        places = [row["seq"] for row in self._altered]
        for row in self._altered:
            origin = next(
                (p for p in places if _digest_or_none(row | {"seq": p}) == row["hash"]), 0
            )
            self._find(
                row["seq"],
                f"holds what was written as row {origin}" if origin else "was changed",
            )

    def _find_gap(self, before: int, after: int) -> None:
        if after <= before:
            self._find(after, f"comes after row {before}")
        elif after == before + 2:
            self._find(after - 1, "is missing")
        else:
            self._find(before + 1, f"is missing, with all up to row {after - 1}")

    def _find(self, seq: int, problem: str) -> None:
        self._findings.append(Finding(seq, problem))


def _digest_or_none(row: Mapping[str, Any]) -> str | None:
    try:
        return digest(row)
    except (TypeError, ValueError):
        # Bytes or NaN, which no writer puts there.
        return None
