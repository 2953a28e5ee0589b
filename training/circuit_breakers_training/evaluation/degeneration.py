"""When a text counts as degenerate: gibberish, or one phrase over and over.

Two statistics of the response's tokens: surprise under the base model, and repeated runs of
tokens. Their limits are those that the base model's own answers to benign requests keep, with a
stated share of exceptions: nothing is judged by a number that was picked by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from circuit_breakers.errors import CalibrationError
from circuit_breakers_training.fluency import Loss
from circuit_breakers_training.probe.calibration import fpr_upper_bound, min_conversations

__all__ = [
    "DegenerateLimits",
    "Fluency",
    "calibrate_limits",
    "check_num_texts",
    "measure_fluency",
    "repeated_share",
]

_RUN_TOKENS = 4
"""Length of the token runs whose repetition is counted."""


class Fluency(NamedTuple):
    """How a response reads, to the base model; both None for an empty one."""

    nats_per_token: float | None
    """Mean negative log-likelihood under the base model, given the prompt."""
    repeated: float | None
    """repeated_share of its tokens."""


@dataclass(frozen=True, kw_only=True)
class DegenerateLimits:
    """A response above one of the limits is degenerate, and so is an empty one."""

    max_nats_per_token: float
    max_repeated: float
    num_texts: int
    """Base model's benign texts behind the limits."""
    num_empty: int
    """Texts left out, as the model wrote nothing."""
    share: float
    """Of base-model benign texts, at most this share is above each limit,"""
    confidence: float
    """with this confidence (Clopper-Pearson)."""

    def degenerate(self, fluency: Fluency) -> bool:
        """Whether a response is gibberish, repetition or nothing."""
        if fluency.nats_per_token is None or fluency.repeated is None:
            return True
        # `not <=`, so that NaN counts.
        fluent = fluency.nats_per_token <= self.max_nats_per_token
        return not (fluent and fluency.repeated <= self.max_repeated)


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that have occurred before, 0 to 1; 0 for short texts."""
    num_runs = len(ids) - _RUN_TOKENS + 1
    if num_runs < 1:
        return 0.0
    runs = {tuple(ids[i : i + _RUN_TOKENS]) for i in range(num_runs)}
    return 1 - len(runs) / num_runs


def measure_fluency(loss: Loss, ids: Sequence[int]) -> Fluency:
    """Fluency of a response of tokens `ids`, whose loss is under the base model."""
    if not ids:
        return Fluency(None, None)
    assert loss.num_tokens == len(ids)
    return Fluency(loss.nats / loss.num_tokens, repeated_share(ids))


def check_num_texts(
    num_texts: int, num_empty: int, *, share: float, confidence: float = 0.95
) -> None:
    """Pass if that many benign answers can support `share`.

    Raises:
        CalibrationError: they cannot.
    """
    needed = min_conversations(share, confidence)
    if num_texts < needed:
        raise CalibrationError(
            f"got {num_texts} benign answers of the base model ({num_empty} empty ones left out) "
            f"to tell degenerate text by, with at most {share:.0%} of them taken for it; expected "
            f"at least {needed}; add benign prompts, or raise --degenerate-share"
        )


def calibrate_limits(
    benign: Sequence[Fluency], *, share: float, confidence: float = 0.95
) -> DegenerateLimits:
    """Lowest limits that the base model's benign texts support.

    Args:
        benign: of the base model's answers to benign requests.
        share: of such texts that may be above a limit, as an upper bound for each of the two.
    Raises:
        CalibrationError: too few texts for that share, or a loss that is not finite.
    """
    kept = [f for f in benign if f.nats_per_token is not None and f.repeated is not None]
    num_empty = len(benign) - len(kept)
    check_num_texts(len(kept), num_empty, share=share, confidence=confidence)
    nats = [f.nats_per_token for f in kept if f.nats_per_token is not None]
    if not all(map(math.isfinite, nats)):
        raise CalibrationError(
            "got a benign answer whose loss under the base model is not finite, expected numbers; "
            "check the base model's weights and dtype"
        )
    allowed = 0
    while fpr_upper_bound(allowed + 1, len(kept), confidence) <= share:
        allowed += 1
    repeated = [f.repeated for f in kept if f.repeated is not None]
    return DegenerateLimits(
        max_nats_per_token=sorted(nats, reverse=True)[allowed],
        max_repeated=sorted(repeated, reverse=True)[allowed],
        num_texts=len(kept),
        num_empty=num_empty,
        share=share,
        confidence=confidence,
    )
