"""How close each probe came to a trip, in the prompt and in the completion apart.

Shapes: T tokens of one stream, K probes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from circuit_breakers.guard.aggregation import RunningScore
from circuit_breakers.guard.decision import Phase
from circuit_breakers.guard.policy import Policy

__all__ = ["margins"]

FloatArray = npt.NDArray[np.float32]


def margins(
    policy: Policy, logit_TK: FloatArray, num_prompt_tokens: int, phase: Phase
) -> dict[str, float]:
    """By probe, how far the highest score of a phase lies above its threshold.

    It is -inf without a score, and for a probe that the policy does not judge.

    At 0 and above the stream trips in that phase, unless it has tripped before. A maximum would
    carry the prompt along into the completion, so there the completion's own tokens count: an
    answer is not blamed for its question.

    Args:
        logit_TK: finite float32 logits of the whole stream, the columns in the policy's order.
    """
    own = slice(0, num_prompt_tokens) if phase == "prompt" else slice(num_prompt_tokens, None)
    # As in the breaker: a completion that is judged alone starts its scores at its first token.
    starts_anew = phase == "completion" and "prompt" not in policy.phases
    skip_tokens = num_prompt_tokens if starts_anew else 0
    found = {}
    for k, probe in enumerate(policy.probes):
        running = RunningScore(probe.aggregation, skip_tokens=skip_tokens)
        score_T = running.update(logit_TK[:, k])[own]
        if phase == "completion" and probe.aggregation.kind == "max":
            # Skipped positions, which have no score, stay without one.
            score_T = np.where(score_T > -np.inf, logit_TK[own, k], score_T)
        peak = float(score_T.max()) if len(score_T) else float("-inf")
        found[probe.name] = peak - float(policy.threshold_K[k])
    return found
