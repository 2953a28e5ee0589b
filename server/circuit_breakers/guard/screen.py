"""Which tokens cannot make their stream trip, without working out a running score.

Shapes: N tokens of any streams, K probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Screen"]

_MARGIN = 1e-6
"""How far below a threshold, relative to it, rounding could lift a mean of logits: 10 times more
than float32 can."""

_NUM_COMPARED_ONE_BY_ONE = 128
"""Logits up to which a loop beats numpy."""


class Screen:
    """A ceiling for each probe, below which a token is harmless.

    A running score is a maximum or a weighted mean of the stream's logits, so it never exceeds the
    largest of them: a stream without a token at a ceiling has not tripped, and nothing of its
    running scores has to be worked out. After a token at a ceiling, a rolling mean may reach its
    threshold with a harmless one, within its window (Policy.longest_window). A token without a
    finite logit is never harmless.
    """

    __slots__ = ("_ceiling_K", "_ceilings")

    def __init__(self, ceiling_K: npt.NDArray[np.float32]) -> None:
        self._ceiling_K = ceiling_K
        self._ceilings: list[float] = ceiling_K.tolist()

    @classmethod
    def below(cls, thresholds: Sequence[float | None]) -> Screen:
        """The screen of one policy; None for a probe that is not judged."""
        ceilings = [
            math.inf if threshold is None else threshold - _MARGIN * max(abs(threshold), 1.0)
            for threshold in thresholds
        ]
        return cls(np.array(ceilings, np.float32))

    @classmethod
    def strictest(cls, screens: Sequence[Screen]) -> Screen:
        """A screen that lets through only what every one of `screens` lets through."""
        return cls(np.min([screen._ceiling_K for screen in screens], axis=0))

    def may_trip(self, logit_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which tokens could make their stream trip, bool (N,)."""
        safe_NK = (logit_NK < self._ceiling_K) & (logit_NK > -np.inf)
        return np.logical_not(safe_NK.all(axis=1))

    def is_harmless(self, logit_NK: npt.NDArray[np.float32]) -> bool:
        """Whether no token may make its stream trip; cheaper than `may_trip` in a decode step."""
        if logit_NK.size > _NUM_COMPARED_ONE_BY_ONE:
            return not self.may_trip(logit_NK).any()
        # A model's forward pass leaves the caches cold: there, numpy's machinery costs the most.
        ceilings = self._ceilings
        return all(
            -math.inf < logit < ceiling
            for logit_K in logit_NK.tolist()
            for logit, ceiling in zip(logit_K, ceilings, strict=True)
        )
