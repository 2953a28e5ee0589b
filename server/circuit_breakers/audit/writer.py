"""AuditWriter: from the event loop to the database, without ever holding a request up.

    record() -> memory -> spool (fsync) -> database
                  |          thread 1        thread 2
                  +--- straight to the database while the spool cannot be written

An entry is safe from kill -9 once it is in the spool, milliseconds after `record`. It leaves the
spool when the database has it. Memory is bounded: what does not fit any more is dropped, counted
and logged. Score traces go from memory to the database; they are statistics, and may be lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from circuit_breakers.audit.entry import AuditEntry, ScoreTrace, days_ago_us
from circuit_breakers.audit.spool import Spool, make_spool_dir
from circuit_breakers.audit.store import AuditStore
from circuit_breakers.errors import CircuitBreakersError

__all__ = ["AuditCounters", "AuditWriter"]

logger = logging.getLogger(__name__)

_MAX_IN_MEMORY = 10_000
_BATCH = 500
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 30.0
_ADOPT_EVERY_S = 60.0
_TRACES_EVERY_S = 1.0
_GATHER_S = 0.1
_PRUNE_EVERY_S = 3600.0

T = TypeVar("T")


class AuditCounters(Protocol):
    """Where losses are counted."""

    def record_audit_dropped(self, num: int) -> None: ...

    def record_traces_dropped(self, num: int) -> None: ...


class AuditWriter:
    """Writes one process's entries and traces. `record` and `trace` never block and never fail."""

    def __init__(
        self,
        store: AuditStore,
        spool_dir: Path,
        counters: AuditCounters,
        *,
        trace_days: int | None = None,
        max_in_memory: int = _MAX_IN_MEMORY,
        last_retry_s: float = _LAST_RETRY_S,
    ) -> None:
        """Nothing is written before `start`.

        Args:
            spool_dir: where entries wait while the database is away; made if it is missing.
            trace_days: traces older than this are taken out; None keeps them.
            max_in_memory: entries, and again traces, that may wait in memory.
            last_retry_s: longest wait between two attempts on a database that is away.
        Raises:
            ConfigError: the folder cannot be made.
        """
        make_spool_dir(spool_dir)
        self.store = store
        self._spool_dir = spool_dir
        self._counters = counters
        self._trace_days = trace_days
        self._max_in_memory = max_in_memory
        self._last_retry_s = last_retry_s
        self._entries: deque[AuditEntry] = deque()
        self._traces: deque[ScoreTrace] = deque()
        self._intake = threading.Lock()
        """Held by whoever takes entries out of memory."""
        self._spool: Spool | None = None
        self._spool_works = True
        self.num_recorded = 0
        """Entries handed over, without those that were dropped."""
        # Each counter has one thread that writes it.
        self._num_into_spool = 0
        self._num_adopted = 0
        self._num_out_of_spool = 0
        self._orphans: list[Spool] = []
        self._to_spool = threading.Event()
        self._to_store = threading.Event()
        self._closing = threading.Event()
        self._is_last = threading.Event()
        """The spooling thread has ended; nothing more comes into the spool."""
        self._last_complaint_s = float("-inf")
        self.sequence = 0
        """Number of the newest row that this process has written; 0 before the first."""
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"audit-{name}", daemon=True)
            for name, work in (("spool", self._spool_loop), ("store", self._store_loop))
        ]

    def start(self) -> None:
        """Starts writing, and takes over what dead processes have left in the spool."""
        self._try_spool()
        for thread in self._threads:
            thread.start()

    @property
    def num_pending(self) -> int:
        """Entries that are not in the database yet, as far as this process answers for them."""
        spooled = self._num_into_spool + self._num_adopted - self._num_out_of_spool
        return len(self._entries) + spooled

    def record(self, entry: AuditEntry) -> None:
        """Hands an entry over; it is on the disk within milliseconds."""
        if len(self._entries) >= self._max_in_memory or self._is_last.is_set():
            self._counters.record_audit_dropped(1)
            self._complain("audit entries are lost: neither spool nor database takes them")
            return
        self._entries.append(entry)
        self.num_recorded += 1
        self._to_spool.set()

    def is_safe(self, num_recorded: int) -> bool:
        """Whether the first so many entries are on the disk, or no disk takes them for now."""
        num_on_disk = self.num_recorded - len(self._entries)
        return num_on_disk >= num_recorded or not self._spool_works

    def trace(self, trace: ScoreTrace) -> None:
        """Hands a trace over; the database has it in about a second."""
        if len(self._traces) >= self._max_in_memory:
            self._counters.record_traces_dropped(1)
            return
        self._traces.append(trace)

    def sync(self, timeout_s: float) -> bool:
        """Waits until everything handed over so far is on the disk; whether it is."""
        return _wait_for(lambda: not self._entries, timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Waits until everything handed over so far is in the database; whether it is."""
        return _wait_for(lambda: not self.num_pending and not self._traces, timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what waits, as far as it goes in time; the rest stays in the spool."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._to_spool.set()
        self._to_store.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self.num_pending:
            logger.warning("audit: closed with %d entries not in the database", self.num_pending)
        if self._entries:
            logger.error("audit: %d of them are lost, the spool took none", len(self._entries))
            self._counters.record_audit_dropped(len(self._entries))
        if any(thread.is_alive() for thread in self._threads):
            # The database holds one of them up; what it was to write is in the spool.
            return
        for spool in (self._spool, *self._orphans):
            if spool is not None:
                spool.close()
        self.store.close()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            logger.critical("the audit log's thread died; restart the server", exc_info=True)
            raise

    # Thread 1: memory -> spool.

    def _spool_loop(self) -> None:
        try:
            while not self._closing.is_set():
                self._to_spool.wait(None if self._spool_works else self._last_retry_s)
                self._to_spool.clear()
                self._try_spool()
                self._to_store.set()
            self._try_spool()
        finally:
            self._is_last.set()

    def _try_spool(self) -> None:
        try:
            with self._intake:
                if self._spool is None:
                    self._spool = Spool.create(self._spool_dir)
                while batch := _oldest(self._entries):
                    self._spool.append(batch)
                    self._num_into_spool += len(batch)
                    _forget(self._entries, len(batch))
            self._spool_works = True
        except OSError as e:
            self._spool_works = False
            self._complain(f"audit spool {self._spool_dir}: {e}; entries wait in memory")

    # Thread 2: spool -> database.

    def _store_loop(self) -> None:
        retry_s = 0.0
        adopted_s = pruned_s = float("-inf")
        is_last = False
        while not is_last:
            self._wait(retry_s)
            is_last = self._is_last.is_set()
            now_s = time.monotonic()
            try:
                if now_s - adopted_s >= _ADOPT_EVERY_S:
                    adopted_s = now_s
                    self._adopt()
                self._deliver()
                if self._trace_days is not None and now_s - pruned_s >= _PRUNE_EVERY_S:
                    pruned_s = now_s
                    self.store.prune_traces(days_ago_us(self._trace_days))
                retry_s = 0.0
            except (CircuitBreakersError, OSError) as e:
                retry_s = min(max(2 * retry_s, _FIRST_RETRY_S), self._last_retry_s)
                self._complain(f"{e}; {self.num_pending} entries wait, traffic goes on")

    def _wait(self, retry_s: float) -> None:
        if self._closing.is_set():
            self._is_last.wait()
        elif retry_s:
            # What comes in during an outage does not hasten the next attempt.
            self._closing.wait(retry_s)
        elif self._to_store.wait(_TRACES_EVERY_S):
            # They are safe in the spool; ten in one transaction cost what one does.
            self._closing.wait(_GATHER_S)
        self._to_store.clear()

    def _adopt(self) -> None:
        for spool in Spool.orphans(self._spool_dir):
            self._num_adopted += spool.count()
            self._orphans.append(spool)

    def _deliver(self) -> None:
        if not self.store.is_set_up:
            self.store.set_up()
        while self._orphans:
            self._empty(self._orphans[0])
            self._orphans.pop(0).close()
        if self._spool is not None:
            self._empty(self._spool)
        if not self._spool_works:
            self._deliver_from_memory()
        while batch := _oldest(self._traces):
            self.store.add_traces(batch)
            _forget(self._traces, len(batch))

    def _empty(self, spool: Spool) -> None:
        while not spool.is_empty:
            batch = spool.peek(_BATCH)
            if batch.entries:
                self.sequence = self.store.append(batch.entries).seq
            spool.delivered(batch)
            self._num_out_of_spool += len(batch.entries) + batch.num_damaged
            if batch.num_damaged:
                self._counters.record_audit_dropped(batch.num_damaged)

    def _deliver_from_memory(self) -> None:
        with self._intake:
            while batch := _oldest(self._entries):
                self.sequence = self.store.append(batch).seq
                _forget(self._entries, len(batch))

    def _complain(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_complaint_s >= 10:
            self._last_complaint_s = now_s
            logger.error("%s", message)


def _oldest(waiting: deque[T]) -> list[T]:
    # By index: an iterator would fail when the event loop appends.
    return [waiting[i] for i in range(min(len(waiting), _BATCH))]


def _forget(waiting: deque[T], num: int) -> None:
    for _ in range(num):
        waiting.popleft()


def _wait_for(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
