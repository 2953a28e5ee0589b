"""A choice's scores wait for the state machine only where none of them can trip."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.engine.delivery import TokenScores
from circuit_breakers.engine.session import ChoiceStream, GuardSession
from circuit_breakers.guard.breaker import StreamBreaker

from .test_stream import AGGREGATIONS, NUM_PROMPT_TOKENS, policy


def deliver(stream: ChoiceStream, scores: TokenScores, logits: list[float]) -> np.ndarray:
    """One output with these logits; its rows."""
    rows = np.array(logits, np.float32)[:, None]
    scores.extend(scores.num_tokens, 1, rows.tobytes(), None)
    stream.judge(scores)
    return rows


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
@settings(deadline=None)
@given(
    steps=st.lists(
        st.lists(st.sampled_from([-10.0, 0.0, 9.0, 20.0, math.nan]), max_size=2),
        min_size=5,
        max_size=12,
    ),
    phases=st.sampled_from([{"prompt"}, {"completion"}, {"prompt", "completion"}]),
    asked=st.sets(st.integers(0, 11)),
)
def test_what_is_known_is_known_as_soon_as_if_every_token_were_judged(
    aggregation: Aggregation, steps: list[list[float]], phases: set[str], asked: set[int]
) -> None:
    judged_by = dataclasses.replace(policy(aggregation), phases=frozenset(phases))
    stream, scores = ChoiceStream(judged_by, NUM_PROMPT_TOKENS), TokenScores()
    oracle = StreamBreaker(judged_by, NUM_PROMPT_TOKENS)
    for number, logits in enumerate(steps):
        oracle.update(deliver(stream, scores, logits))
        # NaN is not equal to itself.
        assert repr(stream.trip) == repr(oracle.trip)
        assert (stream.num_judged, stream.num_scored) == (oracle.num_seen, oracle.num_scored)
        if number in asked:
            assert stream.breaker.report() == oracle.report()
    assert stream.breaker.report() == oracle.report()
    assert stream.breaker.probe_peaks == oracle.probe_peaks


def test_harmless_tokens_wait_together() -> None:
    stream, scores = ChoiceStream(policy(AGGREGATIONS[0]), NUM_PROMPT_TOKENS), TokenScores()
    for _ in range(50):
        deliver(stream, scores, [0.0])
    assert (stream.num_judged, stream._breaker.num_seen) == (50, 0)
    deliver(stream, scores, [20.0])
    assert stream._breaker.num_seen == 51
    assert stream.trip is not None and stream.trip.token_index == 50


def test_a_stop_is_in_the_phase_of_the_token_that_stopped() -> None:
    """In observe mode a prompt may trip and go on, until a token without a score."""
    observing = dataclasses.replace(policy(AGGREGATIONS[0]), mode="observe")
    session, scores = GuardSession(observing), TokenScores()
    stream = session.stream(observing, 0, NUM_PROMPT_TOKENS)
    deliver(stream, scores, [0.0] * (NUM_PROMPT_TOKENS - 1) + [20.0])
    position = NUM_PROMPT_TOKENS
    stop = ["p", math.nan, 1.0, position, "completion"]
    scores.extend(position, 1, np.array([math.nan], np.float32).tobytes(), stop)
    stream.judge(scores)
    assert stream.stopped and stream.trip is not None
    assert (stream.trip.phase, stream.trip.token_index) == ("prompt", position - 1)
    assert session.prompt_tripped is None
    assert session.num_stopped_prompt_tokens == 0
