"""Shares with their exact confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import beta

__all__ = ["CONFIDENCE", "Rate", "clopper_pearson", "rate"]

CONFIDENCE = 0.95
"""Two-sided."""


@dataclass(frozen=True)
class Rate:
    """`count` of `num`, and the Clopper-Pearson interval of the share."""

    count: int
    num: int
    share: float | None
    """None of nothing."""
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """The fields, by name."""
        return asdict(self)


def clopper_pearson(count: int, num: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact two-sided interval of a share after `count` in `num` (Clopper and Pearson 1934)."""
    assert 0 <= count <= num
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, num - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, num - count)) if count < num else 1.0
    return low, high


def rate(outcomes: Iterable[bool]) -> Rate:
    """Share of true outcomes."""
    found = list(outcomes)
    count, num = sum(found), len(found)
    return Rate(count, num, count / num if num else None, *clopper_pearson(count, num))
