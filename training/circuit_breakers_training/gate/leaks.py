"""What the server counted from before the gate's first request to its last one."""

from __future__ import annotations

from typing import Final

from circuit_breakers_training.gate.counters import Counters, read_counters
from circuit_breakers_training.gate.rows import Row
from circuit_breakers_training.gate.target import Target

__all__ = ["leaks"]

_SOURCE: Final = "GET /metrics, before and after"
_COUNTERS: Final = (
    ("leaked", "circuit_breakers_leaked_tokens_total", "tokens at or past a trip that went out"),
    ("unscored", "circuit_breakers_unscored_tokens_total", "tokens that came back without a score"),
    ("scored", "circuit_breakers_scored_tokens_total", "tokens with a score"),
    ("canary_failures", "circuit_breakers_canary_failures_total", "failed runs of the canaries"),
)


def leaks(target: Target) -> list[Row]:
    """Leaked and unscored tokens, which must be none of many scored ones; and the canaries."""
    after = read_counters(target.server)
    scored = _change(target.before, after, "circuit_breakers_scored_tokens_total")
    return [
        *(
            Row(
                name=name,
                what=f"{what}, during the gate",
                # None leaked among no tokens would prove nothing.
                count=int(scored or 0),
                value=_change(target.before, after, series),
                bar=target.bars[f"leaks.{name}"],
                source=f"{_SOURCE}: {series}",
            )
            for name, series, what in _COUNTERS
        ),
        Row(
            name="canaries",
            what="whether every canary had the verdict of its label when they last ran",
            count=1,
            value=f"{after.get('circuit_breakers_canary_ok', float('nan')):g}",
            expected="1",
            source="GET /metrics: circuit_breakers_canary_ok",
        ),
    ]


def _change(before: Counters, after: Counters, series: str) -> float | None:
    """None where the series is missing, or fell: then the server started anew meanwhile."""
    # A series with labels comes into being with its first sample.
    change = after[series] - before.get(series, 0.0) if series in after else -1.0
    return None if change < 0 else change
