"""A stream passes over a token only where its running score cannot trip."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.engine.stream import RequestStream
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy

from .test_request_policy import DEFAULT

NUM_PROMPT_TOKENS = 3
AGGREGATIONS = (
    Aggregation(kind="max"),
    Aggregation(kind="ema", alpha=0.5),
    Aggregation(kind="rolling_mean", window=2),
    Aggregation(kind="rolling_mean", window=3, skip_tokens=2),
)


def policy(aggregation: Aggregation, threshold: float = 10.0) -> Policy:
    update = {"threshold_logit": threshold, "aggregation": aggregation}
    probe = DEFAULT.probes[0].model_copy(update=update)
    return dataclasses.replace(DEFAULT, probes=(probe,))


def stream(judged_by: Policy) -> RequestStream:
    return RequestStream(judged_by, SimpleNamespace(num_prompt_tokens=NUM_PROMPT_TOKENS))


def feed(to: RequestStream, logits: list[float]) -> np.ndarray:
    """Writes one step as the scheduler does; its rows."""
    rows = np.array(logits, np.float32)[:, None]
    to.write(rows.tobytes(), not to.policy.screen.is_harmless(rows))
    return rows


def test_a_rolling_mean_trips_when_a_low_logit_leaves_its_window() -> None:
    judged = stream(policy(Aggregation(kind="rolling_mean", window=2)))
    found = []
    # Means over two: -10, 5, 14.5, 5. None of the last two logits is at the threshold.
    for logit in [0.0, 0.0, -10.0, 20.0, 9.0, 1.0]:
        feed(judged, [logit])
        found.append(judged.judge())
    trip = found[4]
    assert trip is not None and (trip.token_index, trip.score) == (4, 14.5)
    assert [t is not None for t in found] == [False] * 4 + [True, False]


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
@given(
    steps=st.lists(
        st.lists(st.sampled_from([-10.0, 0.0, 9.0, 20.0]), min_size=1, max_size=2),
        min_size=5,
        max_size=12,
    ),
    phases=st.sampled_from([{"prompt"}, {"completion"}, {"prompt", "completion"}]),
)
def test_the_verdict_is_that_of_every_token_judged(
    aggregation: Aggregation, steps: list[list[float]], phases: set[str]
) -> None:
    judged_by = dataclasses.replace(policy(aggregation), phases=frozenset(phases))
    judged = stream(judged_by)
    oracle = StreamBreaker(judged_by, NUM_PROMPT_TOKENS)
    for logits in steps:
        rows = feed(judged, logits)
        assert judged.judge() == oracle.update(rows)
