"""What another threshold would have done to the requests of the last days, from their traces.

Running scores do not depend on the threshold, so a request that ran to its end answers for every
threshold. What cannot be known, and is counted apart as unknown: a request that was stopped at its
trip has no scores from there on, so it may or may not have reached a higher threshold later. Nor
can any trace say what a client would have sent next had it been answered otherwise.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from circuit_breakers.audit.entry import ScoreTrace

__all__ = ["CAVEATS", "Interval", "Thresholds", "WhatIf", "what_if", "wilson"]

CAVEATS = (
    "a request that was stopped at its trip has no scores after it; if it would not have tripped "
    "by then, it counts as unknown",
    "clients that are refused, or are not, send other requests afterwards",
    "the interval takes requests as independent; one user's are not",
)
"""What the numbers cannot know, for people."""

Thresholds = float | Mapping[str, float]
"""One threshold for every probe, or one by probe; a probe without one keeps its own."""

_Z_95 = 1.959963984540054
"""Two-sided 95 %: the 97.5th percentile of the normal distribution."""

Group = Literal["prompt", "completion", "all"]


class Interval(NamedTuple):
    low: float
    high: float


def wilson(num_hits: int, num: int) -> Interval:
    """95 % score interval of a share (Wilson 1927); the whole range without data.

    Chosen over Clopper-Pearson, which needs beta quantiles: Wilson's is as good for shares near 0
    on average, and never wider than needed. A promise still needs the calibration's exact bound.
    """
    if num == 0:
        return Interval(0.0, 1.0)
    share, z2 = num_hits / num, _Z_95**2
    centre = share + z2 / (2 * num)
    spread = _Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    scale = 1 + z2 / num
    low = 0.0 if num_hits == 0 else (centre - spread) / scale
    high = 1.0 if num_hits == num else (centre + spread) / scale
    return Interval(low, high)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """Requests of one policy under one breaker, by the phase in which they would first trip."""

    breaker: str
    policy: str
    phase: Group
    num_requests: int
    num_tripped: int
    """As it was."""
    num_would_trip: int
    """As it would have been, for certain."""
    num_unknown: int
    """Stopped before it could be told."""

    @property
    def interval(self) -> Interval:
        """95 % interval of the share that would trip; unknown requests widen it both ways."""
        low = wilson(self.num_would_trip, self.num_requests).low
        return Interval(low, wilson(self.num_would_trip + self.num_unknown, self.num_requests).high)

    def to_json(self) -> dict[str, Any]:
        share = self.num_would_trip / self.num_requests if self.num_requests else None
        interval = self.interval
        return asdict(self) | {
            "share": share,
            "share_low": interval.low,
            "share_high": interval.high,
        }


def what_if(traces: Iterable[ScoreTrace], thresholds: Thresholds) -> list[WhatIf]:
    """The traces' requests under other thresholds, by breaker, policy and phase."""
    counts: dict[tuple[str, str], _Counts] = defaultdict(_Counts)
    for trace in traces:
        counts[trace.breaker, trace.policy].add(trace, thresholds)
    return [
        WhatIf(
            breaker=breaker,
            policy=policy,
            phase=phase,
            num_requests=count.num,
            num_tripped=count.tripped[phase],
            num_would_trip=count.would_trip[phase],
            num_unknown=count.unknown[phase],
        )
        for (breaker, policy), count in sorted(counts.items())
        for phase in _GROUPS
    ]


_GROUPS: tuple[Group, ...] = ("prompt", "completion", "all")


class _Counts:
    def __init__(self) -> None:
        self.num = 0
        self.tripped: dict[Group, int] = dict.fromkeys(_GROUPS, 0)
        self.would_trip: dict[Group, int] = dict.fromkeys(_GROUPS, 0)
        self.unknown: dict[Group, int] = dict.fromkeys(_GROUPS, 0)

    def add(self, trace: ScoreTrace, thresholds: Thresholds) -> None:
        self.num += 1
        if trace.tripped is not None:
            self.tripped[trace.tripped] += 1
            self.tripped["all"] += 1
        phase = _phase_of_trip(trace, thresholds)
        if phase is not None:
            self.would_trip[phase] += 1
            self.would_trip["all"] += 1
        elif trace.stopped:
            self.unknown["all"] += 1
            self.unknown["completion"] += 1
            if trace.tripped == "prompt":
                self.unknown["prompt"] += 1


def _phase_of_trip(trace: ScoreTrace, thresholds: Thresholds) -> Group | None:
    phases: tuple[Group, ...] = ("prompt", "completion")
    for phase in phases:
        for probe, peak in trace.peaks.get(phase, {}).items():
            if peak >= _threshold(probe, trace, thresholds):
                return phase
    # A token without a score trips under every threshold.
    if trace.num_unscored:
        return trace.tripped or "completion"
    return None


def _threshold(probe: str, trace: ScoreTrace, thresholds: Thresholds) -> float:
    if isinstance(thresholds, Mapping):
        value = thresholds.get(probe, trace.thresholds.get(probe, math.inf))
    else:
        value = thresholds
    # The guard compares in float32.
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
