"""What the guard does to each completion, by the state machine that serves.

T tokens of one conversation, K probes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from circuit_breakers.artifact import Breaker
from circuit_breakers.errors import EvaluationError
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import Trip
from circuit_breakers.guard.policy import Policy
from circuit_breakers_training.evaluation.completions import Completion
from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.probe.fit import token_logits

__all__ = ["Guarded", "guard_completions", "guard_stream"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """One stream as the guard saw it."""

    logit_TK: FloatArray
    """Of every token of prompt and completion."""
    trip: Trip | None
    num_delivered: int
    """Tokens of the completion that a reader gets; the token that trips is not one of them."""
    num_unscored: int
    """Tokens without a finite logit; must be 0."""

    def stopped(self, within: int) -> bool:
        """Whether the stream ended before a reader had `within` tokens."""
        return self.trip is not None and self.num_delivered < within


def guard_stream(policy: Policy, logit_TK: FloatArray, num_prompt_tokens: int) -> Guarded:
    """The verdict on a stream: the first trip, and what had been delivered by then."""
    stream = StreamBreaker(policy, num_prompt_tokens)
    trip = stream.update(np.asarray(logit_TK, np.float32))
    end = len(logit_TK) if trip is None else trip.token_index
    return Guarded(
        logit_TK=logit_TK,
        trip=trip,
        num_delivered=max(0, end - num_prompt_tokens),
        num_unscored=stream.num_unscored,
    )


def guard_completions(
    breaker: Breaker,
    merged_dir: Path,
    completions: Sequence[Completion],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Guarded]:
    """The guard's view of each completion, read from the checkpoint that serving runs.

    Raises:
        EvaluationError: some token has no finite score.
    """
    policy = Policy.from_manifest(breaker.manifest, "enforce")
    probes = [(spec.read_layers, breaker.weights[spec.name]) for spec in policy.probes]
    reader = ResidualReader(merged_dir, sorted({layer for layers, _ in probes for layer in layers}))
    logits = token_logits(reader, [c.rendered for c in completions], probes, progress=progress)
    guarded = [
        guard_stream(policy, logit_TK, completion.rendered.num_prompt_tokens)
        for logit_TK, completion in zip(logits, completions, strict=True)
    ]
    num_unscored = sum(seen.num_unscored > 0 for seen in guarded)
    if num_unscored:
        raise EvaluationError(
            f"got {num_unscored} of {len(guarded)} conversations with tokens that have no finite "
            "score, expected none; check the merged checkpoint and its dtype"
        )
    return guarded
