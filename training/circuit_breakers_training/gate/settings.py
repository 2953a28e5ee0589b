"""What a gate is asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuit_breakers_training.evaluation.settings import (
    check_at_least_one,
    check_degenerate_share,
    check_new,
)

__all__ = ["GateSettings"]


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """One gate of one breaker on one server."""

    url: str
    artifact: Path
    """Directory of the breaker that should be in the server."""
    data: Path
    """Built dataset, whose test split is asked."""
    out: Path
    """Directory of the results, made new."""
    api_key: str | None = field(default=None, repr=False)
    unguarded_url: str | None = None
    """The base model without a guard; asked without a key."""
    bars: Path | None = None
    skip: tuple[str, ...] = ()
    """Checks that are left out, and may be."""
    limit: int = 100
    """Requests of each label that a check has answered, at most."""
    max_new_tokens: int = 64
    degenerate_share: float = 0.05
    """Of the base model's benign answers, at most this share may count as degenerate, for each of
    the two statistics."""
    pairs: int = 8
    """Pairs of neighbouring blocks of the overhead."""

    def __post_init__(self) -> None:
        """Checks what can be checked without the server.

        Raises:
            ConfigError: a number is out of range, or `out` is taken.
        """
        check_at_least_one(self, "limit", "max_new_tokens", "pairs")
        check_degenerate_share(self.degenerate_share)
        check_new(self.out)

    def to_json(self) -> dict[str, Any]:
        """Settings that decide the figures, without paths of this machine."""
        return {
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "degenerate_share": self.degenerate_share,
            "pairs": self.pairs,
            "skip": list(self.skip),
            "has_unguarded_server": self.unguarded_url is not None,
        }
