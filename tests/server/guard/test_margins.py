"""How close each probe came to a trip, by phase."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact.manifest import Aggregation, Calibration, ProbeSpec
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.margins import margins
from circuit_breakers.guard.policy import Policy

SKIPPED = 99.0
"""At position 0, which no probe judges."""


def policy(**aggregation: Any) -> Policy:
    calibration = Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=8
    )
    probes = tuple(
        ProbeSpec(
            name=name,
            layer=1,
            aggregation=Aggregation(**aggregation),
            threshold_logit=threshold,
            calibration=calibration,
        )
        for name, threshold in (("low", 1.0), ("high", 2.0))
    )
    return Policy(breaker="b", probes=probes, mode="observe")


def logits(*rows: tuple[float, float]) -> Any:
    return np.array([(SKIPPED, SKIPPED), *rows], np.float32)


def test_an_answer_is_not_blamed_for_its_question() -> None:
    logit_TK = logits((3.0, 0.0), (-1.0, 0.5), (-2.0, -4.0))
    judged = policy(kind="max")
    # Position 1 is the prompt's: 3 - 1 and 0 - 2; of the answer, -1 - 1 and 0.5 - 2 are highest.
    assert margins(judged, logit_TK, 2, "prompt") == {"low": 2.0, "high": -2.0}
    assert margins(judged, logit_TK, 2, "completion") == {"low": -2.0, "high": -1.5}


def test_a_mean_is_judged_as_it_runs() -> None:
    logit_TK = logits((4.0, 0.0), (0.0, 0.0))
    judged = policy(kind="rolling_mean", window=2)
    # The mean of 4 and 0, less the threshold 1.
    assert margins(judged, logit_TK, 2, "completion")["low"] == 1.0


@pytest.mark.parametrize("num_prompt_tokens", [1, 3])
def test_nothing_scored_is_infinitely_far_from_a_trip(num_prompt_tokens: int) -> None:
    logit_TK = logits((0.0, 0.0), (0.0, 0.0))
    phase: Any = "prompt" if num_prompt_tokens == 1 else "completion"
    assert margins(policy(kind="max"), logit_TK, num_prompt_tokens, phase) == {
        "low": float("-inf"),
        "high": float("-inf"),
    }


@pytest.mark.parametrize(
    "aggregation", [{"kind": "max"}, {"kind": "ema", "alpha": 0.3}], ids=["max", "ema"]
)
def test_the_sign_is_the_verdict_of_the_breaker(aggregation: dict[str, Any]) -> None:
    judged = policy(**aggregation)
    rng = np.random.default_rng(3)
    tripped = []
    for _ in range(200):
        logit_TK = rng.normal(-0.5, 1.0, (12, 2)).astype(np.float32)
        breaker = StreamBreaker(judged, 6)
        trip = breaker.update(logit_TK)
        found = [
            max(margins(judged, logit_TK, 6, phase).values()) >= 0
            for phase in ("prompt", "completion")
        ]
        tripped.append(trip is not None)
        if trip is None:
            assert found == [False, False]
        else:
            assert found[0] == (trip.phase == "prompt")
            assert found[0] or found[1]
    # The test is not empty: either verdict comes up often.
    assert 10 < sum(tripped) < 190


@pytest.mark.parametrize(
    "aggregation",
    [{"kind": "max"}, {"kind": "ema", "alpha": 0.3}, {"kind": "rolling_mean", "window": 3}],
    ids=["max", "ema", "rolling_mean"],
)
def test_a_completion_that_is_judged_alone_is_flagged_where_it_trips(
    aggregation: dict[str, Any],
) -> None:
    judged = dataclasses.replace(policy(**aggregation), phases=frozenset({"completion"}))
    rng = np.random.default_rng(4)
    verdicts = []
    for _ in range(200):
        logit_TK = rng.normal(-0.5, 1.5, (10, 2)).astype(np.float32)
        trips = StreamBreaker(judged, 6).update(logit_TK) is not None
        assert (max(margins(judged, logit_TK, 6, "completion").values()) >= 0) == trips
        verdicts.append(trips)
    assert 10 < sum(verdicts) < 190
