"""What the server hands to its audit log. Without a log every method does nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from circuit_breakers.audit.entry import AuditEntry, ScoreTrace, new_entry_id, now_us
from circuit_breakers.engine.session import GuardSession
from circuit_breakers.errors import AuditError, ConfigError
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import GuardMetrics, Outcome, was_stopped
from circuit_breakers.settings import ServeSettings

if TYPE_CHECKING:
    from circuit_breakers.audit.writer import AuditWriter

__all__ = ["SERVER_KEY_ID", "AuditTrail", "RequestIdentity", "open_trail"]

logger = logging.getLogger(__name__)

SERVER_KEY_ID = "server"
"""Key id of what the server does by itself."""
_WRITTEN_S = 1.0
"""An answer waits no longer for its trip to be on a disk that hangs."""
_POLL_S = 0.001


class RequestIdentity(NamedTuple):
    """What the log says of a request beside its trip."""

    request_id: str
    key_id: str
    model: str


class AuditTrail:
    """One server's way into its log."""

    def __init__(self, writer: AuditWriter | None = None, *, score_traces: bool = False) -> None:
        self.writer = writer
        """None when no log is kept."""
        self.keeps_traces = writer is not None and score_traces
        self._breaker: str | None = None

    def begin(self, breaker: str, detail: str) -> None:
        """Starts writing: this breaker is live from now on.

        Args:
            breaker: its digest.
            detail: what it runs with, in a few words.
        """
        self._breaker = breaker
        if self.writer is not None:
            self.writer.start()
            self.record_admin("started", key_id=SERVER_KEY_ID, detail=detail)

    def close(self) -> None:
        """Writes what waits; the rest stays in the spool for the next start."""
        if self.writer is not None:
            self.writer.close()

    def record_trips(
        self, who: RequestIdentity, trips: Iterable[tuple[int | None, GuardReport]]
    ) -> None:
        """Writes down those of the reports that tripped, each with its number of choice."""
        if self.writer is None:
            return
        for choice, report in trips:
            if report.tripped:
                self.writer.record(
                    AuditEntry(
                        entry_id=new_entry_id(),
                        kind="trip",
                        action="stopped" if was_stopped(report) else "observed",
                        time_us=now_us(),
                        key_id=who.key_id,
                        request_id=who.request_id,
                        model=who.model,
                        policy=report.policy,
                        breaker=self._breaker,
                        phase=report.phase,
                        probe=report.probe,
                        score=report.score,
                        threshold=report.threshold,
                        token_index=report.token_index,
                        choice=choice,
                    )
                )

    async def written(self) -> None:
        """Returns when all entries so far are on the disk, or wait in memory as it takes none."""
        if self.writer is None:
            return
        num_recorded = self.writer.num_recorded
        with suppress(TimeoutError):
            async with asyncio.timeout(_WRITTEN_S):
                while not self.writer.is_safe(num_recorded):
                    await asyncio.sleep(_POLL_S)

    def record_scores(
        self,
        who: RequestIdentity,
        session: GuardSession,
        reports: list[GuardReport],
        outcome: Outcome,
    ) -> None:
        """Keeps how high a request scored, if traces are kept."""
        if self.writer is None or not self.keeps_traces or not reports:
            return
        tripped = [report.phase for report in reports if report.tripped]
        self.writer.trace(
            ScoreTrace(
                request_id=who.request_id,
                time_us=now_us(),
                key_id=who.key_id,
                model=who.model,
                policy=reports[0].policy,
                breaker=self._breaker or "",
                mode=reports[0].mode,
                outcome=outcome,
                num_tokens=sum(report.num_scored for report in reports),
                num_unscored=sum(report.num_unscored for report in reports),
                tripped="prompt" if "prompt" in tripped else (tripped or [None])[0],
                stopped=any(was_stopped(report) for report in reports),
                peaks=session.probe_peaks,
                thresholds=session.thresholds,
            )
        )

    def record_admin(self, action: str, *, key_id: str, detail: str | None = None) -> None:
        """Writes down an act of an operator, such as a reload of the policies.

        Args:
            action: a verb; the log is searched by it.
            detail: a few words, such as the digest of the file that was loaded. Never a secret.
        """
        logger.info("admin act: action=%s key_id=%s detail=%s", action, key_id, detail)
        if self.writer is not None:
            self.writer.record(
                AuditEntry(
                    entry_id=new_entry_id(),
                    kind="admin",
                    action=action,
                    time_us=now_us(),
                    key_id=key_id,
                    breaker=self._breaker,
                    detail=detail,
                )
            )


def open_trail(settings: ServeSettings, metrics: GuardMetrics) -> AuditTrail:
    """The trail that the settings ask for; nothing is written before `begin`.

    A database that does not answer is no reason not to serve: entries wait in the spool.

    Raises:
        ConfigError: the settings do not fit each other, or cannot be used.
    """
    if settings.audit_db is not None and settings.audit_url is not None:
        raise ConfigError("got audit_db and audit_url, expected one of them; leave one out")
    if settings.audit_db is None and settings.audit_url is None:
        _check_nothing_needs_a_log(settings)
        return AuditTrail()
    try:
        # Deferred: a server without a log does not pay for SQLAlchemy.
        from circuit_breakers.audit.chain import Signer
        from circuit_breakers.audit.database import sqlite_url
        from circuit_breakers.audit.store import AuditStore
        from circuit_breakers.audit.writer import AuditWriter
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"the audit log needs {e.name!r}, which is not installed; "
            "pip install 'circuit-breakers[serve]'"
        ) from e

    if settings.audit_url is not None:
        store_url: Any = settings.audit_url.get_secret_value()
    else:
        assert settings.audit_db is not None, "one of the two is set"
        store_url = sqlite_url(settings.audit_db.expanduser())
    key_files = [settings.audit_key_file] if settings.audit_key_file else []
    store = AuditStore(store_url, Signer.from_files(key_files))
    try:
        store.set_up()
    except AuditError as e:
        logger.error("%s; entries wait in the spool", e)
    writer = AuditWriter(
        store, _spool_dir(settings, store.path), metrics, trace_days=settings.trace_days
    )
    metrics.describe_audit(lambda: writer.num_pending, lambda: writer.sequence)
    return AuditTrail(writer, score_traces=settings.score_traces)


def _spool_dir(settings: ServeSettings, database: Path | None) -> Path:
    if settings.audit_spool is not None:
        return settings.audit_spool.expanduser()
    if database is None:
        raise ConfigError(
            "got a PostgreSQL audit log without audit_spool, expected a folder that outlives the "
            "process, where entries wait while the database is away; give --audit-spool"
        )
    return database.with_name(f"{database.name}.spool")


def _check_nothing_needs_a_log(settings: ServeSettings) -> None:
    wanted = {
        "audit_spool": settings.audit_spool is not None,
        "audit_key_file": settings.audit_key_file is not None,
        "score_traces": settings.score_traces,
    }
    if names := [name for name, is_wanted in wanted.items() if is_wanted]:
        raise ConfigError(
            f"got {', '.join(names)} without an audit log, expected one to go with it; "
            "give --audit-db or --audit-url"
        )
