"""What is written down of a request: names, numbers and times, never a word of its text.

AuditEntry   one trip or one act of an operator; goes into the hash-chained log
ScoreTrace   how high one request scored; goes into a table of its own, if asked for
"""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from circuit_breakers.guard.decision import Mode, Phase

__all__ = ["AuditEntry", "Kind", "ScoreTrace", "days_ago_us", "new_entry_id", "now_us"]

Kind = Literal["trip", "admin", "checkpoint"]
"""admin is an act of an operator; checkpoint is the log's own: its start, or rows taken out."""

_MAX_TEXT = 500
_DAY_US = 86_400 * 1_000_000


def new_entry_id() -> str:
    """32 hex digits that no other entry has."""
    return secrets.token_hex(16)


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def days_ago_us(days: float) -> int:
    """Microseconds since 1970, UTC, so many days ago."""
    return now_us() - int(days * _DAY_US)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One line of the log, before it has its place in the chain."""

    entry_id: str
    """The same however often the entry is delivered; the log takes it once."""
    kind: Kind
    action: str
    """What happened: stopped or observed for a trip, a verb such as reload for an act."""
    time_us: int
    """Microseconds since 1970, UTC."""
    key_id: str
    """Whose API key, by its public id; never the key."""
    request_id: str | None = None
    """As in the response's `id` and its x-request-id header."""
    model: str | None = None
    policy: str | None = None
    breaker: str | None = None
    """Digest of the breaker that was live."""
    phase: Phase | None = None
    probe: str | None = None
    score: float | None = None
    """Running score at the trip, a logit; None when the token had none."""
    threshold: float | None = None
    token_index: int | None = None
    """0-based position in prompt and completion of the token that tripped."""
    choice: int | None = None
    """0-based number of the choice, where a request asked for several."""
    detail: str | None = None
    """A few words on an act, such as the digest of a file that was loaded."""

    def normalised(self) -> AuditEntry:
        """The entry as every database gives it back: printable text, finite numbers."""
        values = {field.name: _normalised(getattr(self, field.name)) for field in fields(self)}
        return AuditEntry(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTrace:
    """How close one request came to a trip."""

    request_id: str
    time_us: int
    key_id: str
    model: str
    policy: str
    breaker: str
    """Digest of the breaker."""
    mode: Mode
    outcome: str
    """How the request ended, as in circuit_breakers_requests_total."""
    num_tokens: int
    """Tokens with a score, over all choices."""
    num_unscored: int
    tripped: Phase | None
    """Phase of the first trip; None without one."""
    stopped: bool
    """A stream was ended by its trip: what it would have scored later is not known."""
    peaks: dict[str, dict[str, float]]
    """Highest running score by phase and probe."""
    thresholds: dict[str, float]
    """Threshold in force, by probe."""

    def to_row(self) -> dict[str, Any]:
        row = {field.name: _normalised(getattr(self, field.name)) for field in fields(self)}
        for name in ("peaks", "thresholds"):
            row[name] = json.dumps(row[name], sort_keys=True, separators=(",", ":"))
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ScoreTrace:
        decoded = {name: json.loads(row[name]) for name in ("peaks", "thresholds")}
        return cls(**row | decoded)


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        if value.isprintable() and len(value) <= _MAX_TEXT:
            return value
        # PostgreSQL takes no NUL and no lone surrogate; nobody needs a line break here.
        return "".join(c if c.isprintable() else "?" for c in value[:_MAX_TEXT])
    if isinstance(value, float):
        # SQLite has no NaN, and gives -0.0 back as 0.0.
        return value + 0.0 if math.isfinite(value) else None
    return value
