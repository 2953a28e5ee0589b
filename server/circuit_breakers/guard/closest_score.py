"""The score of each single token: of its running scores, the one that is closest to a trip.

Shapes: T tokens of one stream, K probes, J of them judged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from circuit_breakers.guard.policy import Policy

__all__ = ["ClosestScore", "ClosestScores"]


class ClosestScore(NamedTuple):
    """What one token's verdict came from."""

    probe: str
    """The one that is closest to its threshold, or furthest above it."""
    score: float
    """Its running score, a logit."""
    threshold: float


class ClosestScores:
    """Scores of the tokens of one stream, fed chunk by chunk as the breaker is."""

    def __init__(self, policy: Policy, num_prompt_tokens: int) -> None:
        self._policy = policy
        self._running = policy.running_scores(num_prompt_tokens)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0

    def update(self, logit_TK: npt.NDArray[np.float32]) -> list[ClosestScore | None]:
        """The scores of the next T tokens; None for one that is not judged, or has no score."""
        policy, judged_J = self._policy, self._policy.judged_columns
        score_TJ = self._running.update(logit_TK)[:, judged_J]
        margin_TJ = score_TJ - policy.threshold_K[judged_J]
        start, self._num_seen = self._num_seen, self._num_seen + len(logit_TK)
        found: list[ClosestScore | None] = []
        for t, j in enumerate(margin_TJ.argmax(axis=1).tolist()):
            in_prompt = start + t < self._num_prompt_tokens
            # A NaN is the largest for argmax; a position that is skipped scores -inf.
            known = np.isfinite(score_TJ[t, j]) and (in_prompt or "completion" in policy.phases)
            k = int(judged_J[j])
            found.append(
                ClosestScore(
                    probe=policy.probes[k].name,
                    score=float(score_TJ[t, j]),
                    threshold=float(policy.threshold_K[k]),
                )
                if known
                else None
            )
        return found
