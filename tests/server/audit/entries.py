"""Entries, traces and logs for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuit_breakers.audit.chain import Signer
from circuit_breakers.audit.entry import AuditEntry, ScoreTrace, new_entry_id, now_us
from circuit_breakers.audit.store import AuditStore

KEY = b"k" * 32


def trip(**changes: Any) -> AuditEntry:
    values: dict[str, Any] = {
        "entry_id": new_entry_id(),
        "kind": "trip",
        "action": "stopped",
        "time_us": now_us(),
        "key_id": "anonymous",
        "request_id": "chatcmpl-1",
        "model": "m",
        "policy": "default",
        "breaker": "b" * 64,
        "phase": "completion",
        "probe": "p",
        "score": 1.25,
        "threshold": 1.0,
        "token_index": 7,
        "choice": 0,
    }
    return AuditEntry(**values | changes)


def trace(**changes: Any) -> ScoreTrace:
    values: dict[str, Any] = {
        "request_id": new_entry_id(),
        "time_us": now_us(),
        "key_id": "anonymous",
        "model": "m",
        "policy": "default",
        "breaker": "b" * 64,
        "mode": "enforce",
        "outcome": "ok",
        "num_tokens": 10,
        "num_unscored": 0,
        "tripped": None,
        "stopped": False,
        "peaks": {"prompt": {"p": -1.0}, "completion": {"p": 0.5}},
        "thresholds": {"p": 1.0},
    }
    return ScoreTrace(**values | changes)


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def write_log(path: Path, num_trips: int, *, key: bytes | None = None) -> None:
    """A log of its first row and `num_trips` trips."""
    store = AuditStore(url(path), Signer([key]) if key else None)
    store.append([trip(request_id=f"r{i}", token_index=i) for i in range(num_trips)])
    store.close()


class Counters:
    """Counts what a writer says is lost."""

    def __init__(self) -> None:
        self.num_dropped = 0
        self.num_traces_dropped = 0

    def record_audit_dropped(self, num: int) -> None:
        self.num_dropped += num

    def record_traces_dropped(self, num: int) -> None:
        self.num_traces_dropped += num
