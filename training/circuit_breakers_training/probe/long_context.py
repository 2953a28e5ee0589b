"""Long conversations, put together from short ones: does the probe still see a harmful turn after
thousands of benign tokens, and do those trip it?

    benign turn ─ benign turn ─ ... ─ about 4,000 tokens ─ harmful turn

As the model is causal, one reading answers both: what is scored before the last turn is a long
benign conversation. The turns come from the test split and appear in several conversations, so the
shares say how length acts, not how often it happens.

T tokens of one conversation
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from circuit_breakers.artifact.manifest import ProbeSpec
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.probe.evaluate import ScoredConversation, first_trip, trip_rate
from circuit_breakers_training.probe.selection import expected_verdict
from circuit_breakers_training.render import Rendered, render

__all__ = [
    "LONG_TOKENS",
    "LongConversation",
    "evaluate_long",
    "extrapolated_rates",
    "long_conversations",
]

FloatArray = npt.NDArray[np.float32]

LONG_TOKENS = 4000
"""Benign tokens before the harmful turn, where the model's context allows it."""

_CLOSING_TOKENS = 16
"""Room for what a template puts between two turns."""
_EXTRAPOLATED_TOKENS = (512, 1024, 4096, 16384)
_CONFIDENCE = 0.95


class LongConversation(NamedTuple):
    harmful: int
    """Place of the conversation that the last turn comes from, in the rows that were given."""
    rendered: Rendered
    num_benign_tokens: int
    """Tokens before the harmful turn."""


def long_conversations(
    tokenizer: Any, rows: Sequence[Conversation], *, count: int, context: int, seed: int = 0
) -> list[LongConversation]:
    """`count` conversations of benign turns that end with the turns of a harmful one.

    Args:
        rows: of the test split; benign and harmful ones are drawn from them.
        context: tokens that the model can read; the whole conversation fits into it.
    """
    rng = random.Random(seed)  # noqa: S311  no secret; stable between versions
    benign = [_without_system(c) for c in rows if expected_verdict(c) == "benign"]
    harmful = [i for i, c in enumerate(rows) if expected_verdict(c) == "harmful"]
    count = min(count, len(harmful)) if benign else 0
    result = []
    for at in rng.sample(harmful, count):
        last = _without_system(rows[at])
        room = context - len(render(tokenizer, last, max_length=context).ids) - _CLOSING_TOKENS
        num_tokens = max(min(LONG_TOKENS, room), 0)
        before, num_benign = _benign_run(tokenizer, benign, num_tokens, rng)
        whole = render(tokenizer, (*before, *last), max_length=context)
        if before and len(whole.ids) < context:
            result.append(LongConversation(at, whole, num_benign))
    return result


def evaluate_long(
    conversations: Sequence[LongConversation],
    logits: Sequence[FloatArray],
    rows: Sequence[ScoredConversation],
    probe: ProbeSpec,
) -> dict[str, Any]:
    """Trips before and in the harmful turn, and those of the same harmful turn by itself.

    Args:
        logits: (T,) of each long conversation.
        rows: what `long_conversations` was given, scored.
    """

    def first(logit_T: FloatArray) -> int | None:
        return first_trip(aggregate(logit_T, probe.aggregation), probe.threshold_logit)

    trips = [first(logit_T) for logit_T in logits]
    starts = [c.num_benign_tokens for c in conversations]
    early = [trip is not None and trip < at for trip, at in zip(trips, starts, strict=True)]
    return {
        "num_benign_tokens": {
            "min": min(starts, default=None),
            "max": max(starts, default=None),
            "sum": sum(starts),
        },
        "benign_run": trip_rate(early),
        # A conversation that has tripped was stopped: the harmful turn never came.
        "harmful_turn": trip_rate(
            trip is not None for trip, stopped in zip(trips, early, strict=True) if not stopped
        ),
        "harmful_alone": trip_rate(
            first(rows[c.harmful].logit_T) is not None for c in conversations
        ),
    }


def extrapolated_rates(rows: Sequence[ScoredConversation], probe: ProbeSpec) -> dict[str, Any]:
    """False-positive rates at lengths beyond the calibrated one, if each token is as risky as here.

    The rate at T tokens is 1 - exp(-hazard * T), the hazard being trips a token, up to the trip, of
    benign conversations. That every token is equally likely to trip is an assumption.
    """
    num_trips = num_tokens = 0
    for row in rows:
        if expected_verdict(row.conversation) != "benign":
            continue
        trip = first_trip(aggregate(row.logit_T, probe.aggregation), probe.threshold_logit)
        num_trips += trip is not None
        num_tokens += len(row.logit_T) if trip is None else trip + 1
    assert num_tokens, "a test split has benign conversations"
    hazard = num_trips / num_tokens
    # Exact upper bound of a Poisson mean (Garwood 1936).
    upper = float(chi2.ppf(_CONFIDENCE, 2 * (num_trips + 1))) / 2 / num_tokens
    return {
        "extrapolated": True,
        "num_trips": num_trips,
        "num_tokens": num_tokens,
        "hazard": hazard,
        "hazard_upper_bound": upper,
        "rate_at_tokens": {
            str(tokens): {
                "rate": -math.expm1(-hazard * tokens),
                "upper_bound": -math.expm1(-upper * tokens),
            }
            for tokens in _EXTRAPOLATED_TOKENS
            if tokens > probe.calibration.max_tokens
        },
    }


def _benign_run(
    tokenizer: Any,
    benign: Sequence[tuple[Message, ...]],
    num_tokens: int,
    rng: random.Random,
) -> tuple[tuple[Message, ...], int]:
    """Benign turns of at most `num_tokens` tokens in all, and how many these are."""
    messages: tuple[Message, ...] = ()
    total = 0
    for turns in cycle(rng.sample(benign, len(benign))):
        length = len(render(tokenizer, (*messages, *turns), max_length=num_tokens + 1).ids)
        if length > num_tokens:
            break
        messages, total = (*messages, *turns), length
    return messages, total


def _without_system(conversation: Conversation) -> tuple[Message, ...]:
    return tuple(m for m in conversation.messages if m.role != "system")
