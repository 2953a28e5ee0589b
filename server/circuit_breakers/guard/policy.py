"""What counts as a trip: the probes, their thresholds, where they apply, and what to do about it.

Shapes: K probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from circuit_breakers.artifact.manifest import Manifest, ProbeSpec
from circuit_breakers.guard.aggregation import RunningScores
from circuit_breakers.guard.decision import Mode, Phase
from circuit_breakers.guard.operating_point import probes_at
from circuit_breakers.guard.screen import Screen

__all__ = ["ALL_PHASES", "DEFAULT_POLICY_NAME", "Policy"]

DEFAULT_POLICY_NAME = "default"

ALL_PHASES: frozenset[Phase] = frozenset({"prompt", "completion"})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Thresholds and mode that one stream is judged by."""

    breaker: str
    """Name of the breaker whose probes are judged."""
    probes: tuple[ProbeSpec, ...]
    """In the order of the score columns."""
    mode: Mode
    name: str = DEFAULT_POLICY_NAME
    judged: frozenset[str] | None = None
    """Names of the probes that may trip; None: all of them."""
    phases: frozenset[Phase] = ALL_PHASES
    """Where a token may trip by its score. Where the prompt is left out, running scores start with
    the completion. A token without a score trips in every phase."""

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
    def judges_K(self) -> tuple[bool, ...]:
        """Which probes may trip, in the order of the score columns."""
        return tuple(self.judged is None or p.name in self.judged for p in self.probes)

    @cached_property
    def judged_columns(self) -> npt.NDArray[np.intp]:
        """Score columns of the probes that may trip, ascending."""
        return np.flatnonzero(self.judges_K)

    @cached_property
    def threshold_K(self) -> npt.NDArray[np.float32]:
        """Threshold of each probe, float32 (K,); infinite for one that is not judged."""
        thresholds = [
            p.threshold_logit if judges else np.inf
            for p, judges in zip(self.probes, self.judges_K, strict=True)
        ]
        return np.array(thresholds, np.float32)

    @cached_property
    def screen(self) -> Screen:
        """Tells cheaply which tokens cannot trip by this policy."""
        return Screen.below(
            [
                p.threshold_logit if judges else None
                for p, judges in zip(self.probes, self.judges_K, strict=True)
            ]
        )

    @cached_property
    def longest_window(self) -> int:
        """Tokens for which a high logit may still lift a running score, its own token included.

        A rolling mean rises when a low logit leaves its window, whatever comes in; a maximum and
        an exponential mean only rise with a logit above them.
        """
        return max(p.aggregation.window or 1 for p in self.probes)

    @cached_property
    def may_outscore_calibration(self) -> bool:
        """Whether a running score may be above that of the whole stream, which was calibrated.

        A mean that starts with the completion is one over fewer tokens; a maximum over fewer is
        never higher.
        """
        return "prompt" not in self.phases and any(
            judges and probe.aggregation.kind != "max"
            for probe, judges in zip(self.probes, self.judges_K, strict=True)
        )

    def running_scores(self, num_prompt_tokens: int) -> RunningScores:
        """Those of a stream at its start; of a completion that is judged alone, at its first
        token."""
        skip_tokens = 0 if "prompt" in self.phases else num_prompt_tokens
        return RunningScores([p.aggregation for p in self.probes], skip_tokens=skip_tokens)

    def num_skipped(self, num_prompt_tokens: int) -> int:
        """Leading positions that no probe judges; they must have a finite logit all the same."""
        skipped = min(p.aggregation.skip_tokens for p in self.probes)
        return skipped if "prompt" in self.phases else max(skipped, num_prompt_tokens)
