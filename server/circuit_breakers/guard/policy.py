"""What counts as a trip: the probes, their thresholds, and what to do about it.

Shapes: N tokens of any streams, K probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from circuit_breakers.artifact.manifest import Manifest, ProbeSpec
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.operating_point import probes_at

__all__ = ["DEFAULT_POLICY_NAME", "Policy"]

DEFAULT_POLICY_NAME = "default"

_MARGIN = 1e-6
"""How far below a threshold, relative to it, rounding could lift a mean of logits: 10 times more
than float32 can."""

_NUM_COMPARED_ONE_BY_ONE = 128
"""Logits up to which a loop beats numpy."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Thresholds and mode that one stream is judged by."""

    breaker: str
    """Name of the breaker whose probes are judged."""
    probes: tuple[ProbeSpec, ...]
    """In the order of the score columns."""
    mode: Mode
    name: str = DEFAULT_POLICY_NAME

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, mode: Mode, target_fpr: float | None = None
    ) -> Policy:
        """The policy that the breaker was calibrated for.

        Args:
            target_fpr: the promise to keep, of those that the breaker's data supports; None takes
                the one that it was exported with.
        Raises:
            CalibrationError: the data does not support it.
        """
        probes = probes_at(manifest, target_fpr)
        return cls(breaker=manifest.name, probes=probes, mode=mode)

    @cached_property
    def num_skipped(self) -> int:
        """Leading positions that no probe judges; they must have a finite logit all the same."""
        return min(p.aggregation.skip_tokens for p in self.probes)

    @cached_property
    def _ceiling_K(self) -> npt.NDArray[np.float32]:
        threshold_K = np.array([p.threshold_logit for p in self.probes], np.float64)
        ceiling_K = threshold_K - _MARGIN * np.maximum(np.abs(threshold_K), 1.0)
        return ceiling_K.astype(np.float32)

    @cached_property
    def _ceilings(self) -> list[float]:
        ceilings: list[float] = self._ceiling_K.tolist()
        return ceilings

    def may_trip(self, logit_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which tokens could make their stream trip, bool (N,).

        A running score is a maximum or a weighted mean of the stream's logits, so it never exceeds
        the largest of them: a stream without such a token has not tripped, and nothing of its
        running scores has to be worked out. A token without a finite logit counts.
        """
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
