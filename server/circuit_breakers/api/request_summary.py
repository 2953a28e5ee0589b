"""What may be told of a completion request that has ended, to logs and traces: never a word of it.

Importing this module is light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import Outcome

__all__ = ["RequestSummary"]


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """One request, from its first byte to the last of its answer."""

    request_id: str
    key_id: str
    model: str
    """The name that it was served under."""
    endpoint: str
    outcome: Outcome
    error: str | None
    """Code of the error that it was answered with."""
    started_ns: int
    """Since 1970."""
    duration_s: float
    ttft_s: float | None
    """Seconds until the first scored token was handed on; None without one."""
    policy: str | None = None
    """What it ran under; None when it ended before that was known."""
    num_prompt_tokens: int = 0
    """As usage counts them: once for all choices of a prompt."""
    num_completion_tokens: int = 0
    """Delivered."""
    finish_reasons: tuple[str, ...] = ()
    """Of the choices that ended."""
    report: GuardReport | None = None
    """Of the choice that tripped, else of the one closest to its threshold; None before any."""
    trips: tuple[tuple[int | None, GuardReport], ...] = ()
    """Number of choice, None for all, and report of each that tripped."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """The caller's traceparent."""

    def to_json(self) -> dict[str, Any]:
        """Flat fields of a log line."""
        report = self.report
        return {
            "request_id": self.request_id,
            "key_id": self.key_id,
            "model": self.model,
            "endpoint": self.endpoint,
            "outcome": self.outcome,
            "error": self.error,
            "policy": self.policy,
            "mode": report.mode if report else None,
            "tripped": bool(report and report.tripped),
            "phase": report.phase if report else None,
            "probe": report.probe if report else None,
            "score": report.score if report else None,
            "threshold": report.threshold if report else None,
            "token_index": report.token_index if report else None,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "duration_s": round(self.duration_s, 6),
        }
