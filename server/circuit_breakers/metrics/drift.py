"""How far live scores have moved from those that the threshold was calibrated on.

The population stability index over the calibration's bins, sum of (o - e) ln(o / e) with the
shares e expected and o observed: the symmetric Kullback-Leibler divergence (Jeffreys). By custom
below 0.1 is no change to speak of, and from 0.25 on a large one. Chance alone gives about
(bins - 1) (1 / calibrated + 1 / live): 0.02 for 10 bins, 500 conversations and 2,000 answers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from circuit_breakers.artifact.manifest import ScoreHistogram

__all__ = ["MIN_REQUESTS", "DriftWindow", "stability_index"]

_WINDOW_REQUESTS = 2000
"""Newest answers that are looked at."""
MIN_REQUESTS = 200
"""With fewer, chance alone could look like a change."""
_SMOOTHING = 0.5
"""Added to each bin, so that an empty one has a logarithm (Jeffreys' prior)."""


def stability_index(expected: Sequence[int], observed: Sequence[int]) -> float:
    """Population stability index of two counts over the same bins; 0 when their shares agree."""
    pairs = zip(_shares(expected), _shares(observed), strict=True)
    return math.fsum((o - e) * math.log(o / e) for e, o in pairs)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _SMOOTHING * len(counts)
    return [(count + _SMOOTHING) / total for count in counts]


class DriftWindow:
    """The newest scores of one phase under one probe, as counts in the calibration's bins."""

    def __init__(self, calibrated: ScoreHistogram, size: int = _WINDOW_REQUESTS) -> None:
        self._calibrated = calibrated
        self._bins: deque[int] = deque()
        self._size = size
        self._counts = [0] * len(calibrated.counts)

    @property
    def num_requests(self) -> int:
        return len(self._bins)

    @property
    def counts(self) -> tuple[int, ...]:
        """Scores in each bin of the calibration."""
        return tuple(self._counts)

    def add(self, score: float) -> None:
        """Takes the newest score in, and the oldest out of a full window."""
        if len(self._bins) == self._size:
            self._counts[self._bins.popleft()] -= 1
        number = bisect_right(self._calibrated.edges, score)
        self._bins.append(number)
        self._counts[number] += 1

    @property
    def index(self) -> float:
        """Against the calibration; NaN below MIN_REQUESTS."""
        if self.num_requests < MIN_REQUESTS:
            return math.nan
        return stability_index(self._calibrated.counts, self._counts)
