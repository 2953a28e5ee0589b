"""The score of each token is what the breaker judged it by."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.closest_score import ClosestScore, ClosestScores
from circuit_breakers.guard.policy import Policy

from ..policies.manifests import EMA, MAX, MEAN, manifest

NUM_PROMPT_TOKENS = 4


def policy(aggregation: Aggregation = MAX) -> Policy:
    """p0 and p1, of thresholds 4 and 6; position 0 is skipped."""
    return Policy.from_manifest(manifest(aggregations=(aggregation, aggregation)), "observe")


@pytest.mark.parametrize("aggregation", [MAX, EMA, MEAN], ids=lambda a: a.kind)
@pytest.mark.parametrize("chunk", [1, 3, 12])
@pytest.mark.parametrize("high", [0.0, 9.0])
def test_scores_are_those_of_the_breaker(aggregation: Aggregation, chunk: int, high: float) -> None:
    judged = policy(aggregation)
    logit_TK = np.random.default_rng(3).normal(0, 2, (12, 2)).astype(np.float32)
    logit_TK[7, 1] += high
    breaker = StreamBreaker(judged, NUM_PROMPT_TOKENS)
    breaker.update(logit_TK)
    scores = ClosestScores(judged, NUM_PROMPT_TOKENS)
    parts = [logit_TK[start : start + chunk] for start in range(0, 12, chunk)]
    first, *found = [one for part in parts for one in scores.update(part)]
    assert first is None, "position 0 is an attention sink"
    known = [one for one in found if one is not None]
    assert len(known) == 11
    report = breaker.report()
    closest = max(known, key=lambda one: one.score - one.threshold)
    assert closest.threshold == {"p0": 4.0, "p1": 6.0}[closest.probe]
    if breaker.trip is None:
        assert closest == ClosestScore(str(report.probe), report.score or 0.0, closest.threshold)
    else:
        trips = [one.score >= one.threshold for one in known]
        assert trips.index(True) + 1 == breaker.trip.token_index
        at_trip = known[breaker.trip.token_index - 1]
        assert at_trip == (breaker.trip.probe, breaker.trip.score, breaker.trip.threshold)


def test_a_probe_that_is_not_judged_has_no_score() -> None:
    judged = dataclasses.replace(policy(), judged=frozenset({"p0"}))
    found = ClosestScores(judged, 2).update(np.array([[0, 0], [1, 99]], np.float32))
    assert found == [None, ("p0", 1.0, 4.0)]


@pytest.mark.parametrize("phase", ["prompt", "completion"])
def test_a_phase_that_is_not_judged_has_no_scores(phase: str) -> None:
    judged = dataclasses.replace(policy(), phases=frozenset({phase}))
    found = ClosestScores(judged, 2).update(np.ones((4, 2), np.float32))
    # Position 0 is skipped, 1 is the prompt's, 2 and 3 the completion's.
    expected = [1] if phase == "prompt" else [2, 3]
    assert [t for t, one in enumerate(found) if one is not None] == expected


def test_a_token_without_a_score_has_none() -> None:
    logit_TK = np.array([[0, 0], [np.nan, 1], [1, 1]], np.float32)
    assert ClosestScores(policy(), 2).update(logit_TK)[1] is None
