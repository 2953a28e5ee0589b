"""AuditStore: the log and the score traces in their database.

One chain a log, however many processes write: an append reads the head and writes after it in one
transaction that excludes all others, and a second row after the same head is refused by the table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, delete, func, insert, select
from sqlalchemy.engine import URL

from circuit_breakers.audit.chain import HEAD_LOST, Head, Signer, checkpoint_detail, linked
from circuit_breakers.audit.database import Database
from circuit_breakers.audit.entry import AuditEntry, ScoreTrace, new_entry_id, now_us
from circuit_breakers.audit.tables import AUDIT_LOG, METADATA, SCORE_TRACES
from circuit_breakers.errors import AuditError, ConfigError

__all__ = ["AuditStore", "Pruning", "TripFilter", "TripPage"]

logger = logging.getLogger(__name__)

_OPERATOR = "operator"
"""Key id of acts at the command line."""


@dataclass(frozen=True, kw_only=True)
class TripFilter:
    """Which trips are asked for; None leaves a field open."""

    since_us: int | None = None
    """Microseconds since 1970, included."""
    until_us: int | None = None
    """Microseconds since 1970, excluded."""
    key_id: str | None = None
    policy: str | None = None
    phase: str | None = None
    probe: str | None = None


class TripPage(NamedTuple):
    """Some trips, newest first."""

    rows: list[dict[str, Any]]
    next_seq: int | None
    """Where the next page starts; None after the last."""


class Pruning(NamedTuple):
    """What retention took out."""

    num_entries: int
    num_traces: int


class AuditStore:
    """The database of one log. Every method may be called from any thread."""

    def __init__(
        self, url: str | URL, signer: Signer | None = None, *, patient: bool = False
    ) -> None:
        """Nothing is connected yet.

        Raises:
            ConfigError: the URL cannot be used.
        """
        self._database = Database(url, patient=patient)
        self._signer = signer
        self.is_set_up = False
        """The tables are there, as this process has seen."""
        self._last: Head | None = None
        """The newest row that this process knows of."""

    def __str__(self) -> str:
        return str(self._database)

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database; None for a server."""
        return self._database.path

    def close(self) -> None:
        self._database.close()

    def check_exists(self) -> None:
        """Passes for a database that holds a log already.

        Raises:
            ConfigError: it does not.
            AuditError: it does not answer.
        """
        if not self._database.has(AUDIT_LOG):
            raise ConfigError(f"no audit log in {self}; give the URL that the server writes to")

    def set_up(self) -> None:
        """Makes the tables and the first row where they are missing.

        Raises:
            ConfigError: the log is signed, and there is no key to go on signing with.
            AuditError: the database does not answer.
        """
        self._database.make_file()
        with self._database.writing(locked=True) as connection:
            METADATA.create_all(connection)
            head = self._head(connection)
            if head is None:
                self._append(connection, None, [])
            elif self._signer is None and self._is_signed(connection, head):
                raise ConfigError(
                    f"the audit log in {self} is signed, expected a key to go on with; "
                    "give --audit-key-file"
                )
        self.is_set_up = True

    def append(self, entries: Sequence[AuditEntry]) -> Head:
        """Adds those of the entries that the log does not hold yet; the head from then on.

        Raises:
            AuditError: nothing was added, as far as is known; the same entries may come again.
        """
        with self._writing(locked=True) as connection:
            known = self._known(connection, AUDIT_LOG, "entry_id", [e.entry_id for e in entries])
            new = {e.entry_id: e for e in entries if e.entry_id not in known}
            head = self._head(connection)
            if self._last is not None and self._is_lost(connection, self._last, head):
                logger.critical("the audit log was cut off or rewritten: head=%s", self._last)
                lost = _checkpoint(HEAD_LOST, str(self._last))
                head = self._append(connection, head, [lost])
            head = self._append(connection, head, list(new.values()))
        self._last = head
        return head

    def add_traces(self, traces: Sequence[ScoreTrace]) -> None:
        """Adds those of the traces that are not there yet.

        Raises:
            AuditError: none was added, as far as is known.
        """
        with self._writing(locked=False) as connection:
            rows = {trace.request_id: trace.to_row() for trace in traces}
            for request_id in self._known(connection, SCORE_TRACES, "request_id", list(rows)):
                del rows[request_id]
            if rows:
                connection.execute(insert(SCORE_TRACES), list(rows.values()))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The whole log in order, as of now.

        Raises:
            AuditError: the database does not answer.
        """
        yield from self._database.read(select(AUDIT_LOG).order_by(AUDIT_LOG.c.seq))

    def traces(
        self, since_us: int, *, breaker: str | None = None, limit: int | None = None
    ) -> Iterator[ScoreTrace]:
        """Score traces from `since_us` on, newest first.

        Args:
            breaker: digest of the one breaker that is asked for; None takes all.
        Raises:
            AuditError: the database does not answer.
        """
        c = SCORE_TRACES.c
        query = select(SCORE_TRACES).where(c.time_us >= since_us).order_by(c.time_us.desc())
        if breaker is not None:
            query = query.where(c.breaker == breaker)
        query = query.limit(limit)
        for row in self._database.read(query):
            yield ScoreTrace.from_row(row)

    def trips(self, which: TripFilter, *, before_seq: int | None, limit: int) -> TripPage:
        """One page of trips, newest first.

        Raises:
            AuditError: the database does not answer.
        """
        c = AUDIT_LOG.c
        query = select(AUDIT_LOG).where(c.kind == "trip")
        if which.since_us is not None:
            query = query.where(c.time_us >= which.since_us)
        if which.until_us is not None:
            query = query.where(c.time_us < which.until_us)
        for name in ("key_id", "policy", "phase", "probe"):
            if (wanted := getattr(which, name)) is not None:
                query = query.where(c[name] == wanted)
        if before_seq is not None:
            query = query.where(c.seq < before_seq)
        rows = list(self._database.read(query.order_by(c.seq.desc()).limit(limit + 1)))
        more = len(rows) > limit
        return TripPage(rows[:limit], rows[limit - 1]["seq"] if more else None)

    def prune(self, before_us: int) -> Pruning:
        """Takes out entries and traces from before `before_us`, and writes down that it did.

        Only the oldest rows without a gap go, so that the rest is still one chain; a checkpoint at
        its end says where it now begins.

        Raises:
            AuditError: nothing was taken out.
        """
        c = AUDIT_LOG.c
        with self._database.writing(locked=True) as connection:
            kept = connection.scalar(select(func.min(c.seq)).where(c.time_us >= before_us))
            last = select(AUDIT_LOG).order_by(c.seq.desc())
            if kept is not None:
                last = last.where(c.seq < kept)
            row = connection.execute(last.limit(1)).mappings().first()
            num_entries = 0
            if row is not None:
                detail = checkpoint_detail(Head(row["seq"], row["hash"]))
                self._append(connection, self._head(connection), [_checkpoint("pruned", detail)])
                gone = connection.execute(delete(AUDIT_LOG).where(c.seq <= row["seq"]))
                num_entries = gone.rowcount
            return Pruning(num_entries, self._prune_traces(connection, before_us))

    def prune_traces(self, before_us: int) -> int:
        """Takes out score traces from before `before_us`; how many.

        Raises:
            AuditError: nothing was taken out.
        """
        with self._database.writing(locked=False) as connection:
            return self._prune_traces(connection, before_us)

    @contextmanager
    def _writing(self, *, locked: bool) -> Iterator[Connection]:
        """A transaction on tables that are there."""
        if not self.is_set_up:
            self.set_up()
        try:
            with self._database.writing(locked=locked) as connection:
                yield connection
        except AuditError:
            # What comes back may be another database, without them.
            self.is_set_up = False
            raise

    def _append(
        self, connection: Connection, head: Head | None, entries: Sequence[AuditEntry]
    ) -> Head:
        if head is None:
            entries = [_checkpoint("created", None), *entries]
        rows = linked([entry.normalised() for entry in entries], head, self._signer)
        if rows:
            connection.execute(insert(AUDIT_LOG), rows)
            head = Head(rows[-1]["seq"], rows[-1]["hash"])
        assert head is not None, "a log has a first row"
        return head

    def _head(self, connection: Connection) -> Head | None:
        c = AUDIT_LOG.c
        row = connection.execute(select(c.seq, c.hash).order_by(c.seq.desc()).limit(1)).first()
        return None if row is None else Head(*row)

    def _is_lost(self, connection: Connection, last: Head, head: Head | None) -> bool:
        """Whether a row that this process has written is no longer the one at its place."""
        if head is None or head.seq < last.seq:
            return True
        found = connection.scalar(select(AUDIT_LOG.c.hash).where(AUDIT_LOG.c.seq == last.seq))
        # Pruning may have taken it out.
        return found is not None and found != last.hash

    def _is_signed(self, connection: Connection, head: Head) -> bool:
        c = AUDIT_LOG.c
        return connection.scalar(select(c.mac).where(c.seq == head.seq)) is not None

    def _known(
        self, connection: Connection, table: Table, column: str, values: Sequence[str]
    ) -> list[str]:
        query = select(table.c[column]).where(table.c[column].in_(values))
        return list(connection.scalars(query))

    def _prune_traces(self, connection: Connection, before_us: int) -> int:
        old = SCORE_TRACES.c.time_us < before_us
        return connection.execute(delete(SCORE_TRACES).where(old)).rowcount


def _checkpoint(action: str, detail: str | None) -> AuditEntry:
    return AuditEntry(
        entry_id=new_entry_id(),
        kind="checkpoint",
        action=action,
        time_us=now_us(),
        key_id=_OPERATOR,
        detail=detail,
    )
