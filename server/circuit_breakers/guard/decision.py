"""What the guard decided about one stream: values that travel, no behaviour.

A trip is a decision, not an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["GuardReport", "Mode", "Phase", "Trip"]

Mode = Literal["observe", "enforce"]
"""observe reports and never stops; enforce stops the request."""

Phase = Literal["prompt", "completion"]


class Trip(NamedTuple):
    """The first token whose running score reached a threshold."""

    probe: str
    score: float
    """Running score at the token, a logit; NaN when the token has no usable score."""
    threshold: float
    token_index: int
    """0-based position in prompt + completion."""
    phase: Phase


@dataclass(frozen=True, kw_only=True)
class GuardReport:
    """What the guard saw of one stream (one choice of one request)."""

    breaker: str
    policy: str
    mode: Mode
    tripped: bool
    phase: Phase | None
    """Phase of the trip; None without a trip."""
    probe: str | None
    """The probe that tripped, else the one closest to its threshold; None before any score."""
    score: float | None
    """Running score at the trip, else the highest so far, of `probe`; None when unknown."""
    threshold: float | None
    token_index: int | None
    """0-based position in prompt + completion of the token that `score` belongs to."""
    num_scored: int = 0
    """Tokens with a score."""
    num_unscored: int = 0
    """Tokens that were fed to the model and came back without a score; must stay 0."""

    def to_json(self) -> dict[str, str | bool | int | float | None]:
        """The `guard` object of a response."""
        return {
            "breaker": self.breaker,
            "policy": self.policy,
            "mode": self.mode,
            "tripped": self.tripped,
            "phase": self.phase,
            "probe": self.probe,
            "score": self.score,
            "threshold": self.threshold,
            "token_index": self.token_index,
        }
