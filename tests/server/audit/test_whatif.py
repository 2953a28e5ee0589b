"""What traces can tell of another threshold, and what they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation, Calibration, ProbeSpec
from circuit_breakers.audit.entry import ScoreTrace
from circuit_breakers.audit.whatif import WhatIf, what_if, wilson
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy

from .entries import trace


def counts(traces: list[ScoreTrace], thresholds: Any) -> dict[str, tuple[int, int, int]]:
    """(would trip, unknown, did trip) by phase."""
    groups = what_if(traces, thresholds)
    assert {(g.num_requests, g.policy) for g in groups} == {(len(traces), "default")}
    return {g.phase: (g.num_would_trip, g.num_unknown, g.num_tripped) for g in groups}


@pytest.mark.parametrize(
    ("num_hits", "num", "low", "high"),
    [
        # Brown, Cai and DasGupta 2001, equation (4), worked out with z = 1.96 by hand.
        (0, 300, 0.0, 0.012643),
        (1, 10, 0.017876, 0.404150),
        (50, 100, 0.403832, 0.596168),
        (10, 10, 0.722467, 1.0),
    ],
)
def test_wilson_interval(num_hits: int, num: int, low: float, high: float) -> None:
    assert wilson(num_hits, num) == pytest.approx((low, high), abs=1e-5)


def test_without_requests_any_share_is_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert what_if([], 1.0) == []


def test_a_request_that_ran_to_its_end_answers_for_every_threshold() -> None:
    ran = trace(peaks={"prompt": {"p": -1.0}, "completion": {"p": 0.5}})
    assert counts([ran], 0.6) == dict.fromkeys(("prompt", "completion", "all"), (0, 0, 0))
    assert counts([ran], 0.5)["completion"] == (1, 0, 0)
    assert counts([ran], -1.0) == {"prompt": (1, 0, 0), "completion": (0, 0, 0), "all": (1, 0, 0)}


def test_a_stopped_request_is_unknown_above_what_it_reached() -> None:
    stopped = trace(
        tripped="completion",
        stopped=True,
        peaks={"prompt": {"p": 0.0}, "completion": {"p": 1.5}},
    )
    assert counts([stopped], 1.5)["completion"] == (1, 0, 1)
    assert counts([stopped], 2.0) == {
        "prompt": (0, 0, 0),
        "completion": (0, 1, 1),
        "all": (0, 1, 1),
    }
    at_prompt = trace(tripped="prompt", stopped=True, peaks={"prompt": {"p": 1.5}})
    # Nobody knows whether its prompt went on to score higher, or what the answer would have been.
    assert counts([at_prompt], 2.0) == {
        "prompt": (0, 1, 1),
        "completion": (0, 1, 0),
        "all": (0, 1, 1),
    }


def test_an_observed_trip_is_known_to_its_end() -> None:
    observed = trace(mode="observe", tripped="completion", peaks={"completion": {"p": 1.5}})
    assert counts([observed], 2.0)["all"] == (0, 0, 1)


def test_each_probe_has_its_threshold_and_the_others_keep_theirs() -> None:
    two = trace(peaks={"completion": {"p": 0.9, "q": 3.0}}, thresholds={"p": 1.0, "q": 4.0})
    assert counts([two], {"p": 0.9})["all"] == (1, 0, 0)
    assert counts([two], {"q": 3.5})["all"] == (0, 0, 0)
    assert counts([two], {"q": 2.5})["all"] == (1, 0, 0)


def test_a_token_without_a_score_trips_under_every_threshold() -> None:
    unscored = trace(num_unscored=1, tripped="completion", stopped=True)
    assert counts([unscored], 1e9)["completion"] == (1, 0, 1)


def test_breakers_and_policies_are_counted_apart() -> None:
    groups = what_if([trace(), trace(policy="strict"), trace(breaker="c" * 64)], 1.0)
    assert {(g.breaker[0], g.policy) for g in groups} == {
        *(("b", "default"), ("b", "strict"), ("c", "default")),
    }


def test_unknown_requests_widen_the_interval_upwards() -> None:
    base: dict[str, Any] = {"breaker": "b", "policy": "d", "phase": "all", "num_tripped": 0}
    known = WhatIf(**base, num_requests=100, num_would_trip=5, num_unknown=0)
    unsure = WhatIf(**base, num_requests=100, num_would_trip=5, num_unknown=10)
    assert unsure.interval == (known.interval.low, wilson(15, 100).high)
    assert unsure.to_json()["share_high"] == unsure.interval.high


def probe(name: str, threshold: float) -> ProbeSpec:
    calibration = Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
    )
    return ProbeSpec(
        name=name,
        layer=1,
        aggregation=Aggregation(kind="max"),
        threshold_logit=threshold,
        calibration=calibration,
    )


@given(
    logits=st.lists(st.tuples(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32)), min_size=1),
    num_prompt=st.integers(0, 5),
    threshold=st.floats(-4, 4),
)
def test_what_if_of_an_observed_stream_is_what_the_guard_does_under_that_threshold(
    logits: list[tuple[float, float]], num_prompt: int, threshold: float
) -> None:
    logit_TK = np.array(logits, np.float32)

    def judged(at: float) -> StreamBreaker:
        policy = Policy(breaker="b", probes=(probe("p", at), probe("q", at)), mode="observe")
        breaker = StreamBreaker(policy, num_prompt)
        for row_K in logit_TK:
            breaker.update(row_K[None])
        return breaker

    seen = trace(mode="observe", peaks=dict(judged(9.0).probe_peaks))
    trip = judged(threshold).trip
    found = counts([seen], threshold)
    expected = {"prompt": 0, "completion": 0, "all": int(trip is not None)}
    if trip is not None:
        expected[trip.phase] = 1
    assert {phase: would for phase, (would, _, _) in found.items()} == expected
