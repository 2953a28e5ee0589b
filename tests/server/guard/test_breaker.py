from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation, Calibration, ProbeSpec
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.policy import Policy

CALIBRATION = Calibration(
    target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=256
)


def policy(*thresholds: float, mode: Mode = "enforce", **changes: Any) -> Policy:
    probes = tuple(
        ProbeSpec(
            name=f"probe{i}",
            layer=i,
            aggregation=Aggregation(kind="max"),
            threshold_logit=threshold,
            calibration=CALIBRATION,
        )
        for i, threshold in enumerate(thresholds)
    )
    return Policy(breaker="test", probes=probes, mode=mode, **changes)


def column(*logits: float) -> np.ndarray:
    return np.array(logits, np.float32)[:, None]


def test_trips_at_the_first_token_that_reaches_the_threshold() -> None:
    breaker = StreamBreaker(policy(2.0), num_prompt_tokens=2)
    assert breaker.update(column(9, 1)) is None
    trip = breaker.update(column(1.5, 2.0, 7.0))
    assert trip is not None
    assert (trip.token_index, trip.score, trip.phase) == (3, 2.0, "completion")


def test_trips_once_and_stays_tripped() -> None:
    breaker = StreamBreaker(policy(2.0), num_prompt_tokens=2)
    assert breaker.update(column(0, 3)) is not None
    assert breaker.update(column(9)) is None
    assert breaker.trip is not None
    assert breaker.trip.token_index == 1
    assert breaker.report().phase == "prompt"


def test_attention_sink_never_trips() -> None:
    breaker = StreamBreaker(policy(2.0), num_prompt_tokens=1)
    assert breaker.update(column(1e6)) is None
    assert breaker.report().score is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_token_without_finite_score_trips_even_at_position_zero(bad: float) -> None:
    for at in (0, 1, 5):
        logit_T1 = np.zeros((6, 1), np.float32)
        logit_T1[at] = bad
        breaker = StreamBreaker(policy(2.0), num_prompt_tokens=3)
        trip = breaker.update(logit_T1)
        assert trip is not None
        assert trip.token_index == at
        assert math.isnan(trip.score)
        assert (breaker.num_scored, breaker.num_unscored) == (5, 1)


def test_report_names_the_probe_closest_to_its_threshold() -> None:
    breaker = StreamBreaker(policy(10.0, 2.0), num_prompt_tokens=2)
    breaker.update(np.array([[0, 0], [5, 1], [6, 0.5]], np.float32))
    report = breaker.report()
    assert (report.probe, report.score, report.token_index) == ("probe1", 1.0, 1)
    assert not report.tripped
    assert breaker.phase_peaks == {"prompt": 5.0, "completion": 6.0}


def test_peaks_are_known_by_phase_and_probe() -> None:
    breaker = StreamBreaker(policy(10.0, 2.0), num_prompt_tokens=2)
    assert breaker.probe_peaks == {}
    breaker.update(np.array([[0, 0], [5, 1]], np.float32))
    assert breaker.probe_peaks == {"prompt": {"probe0": 5.0, "probe1": 1.0}}
    breaker.update(np.array([[6, 0.5], [4, 0.75], [np.nan, 1.5]], np.float32))
    assert breaker.probe_peaks["completion"] == {"probe0": 6.0, "probe1": 1.5}
    assert breaker.thresholds == {"probe0": 10.0, "probe1": 2.0}


def test_report_is_json_whatever_was_seen() -> None:
    for logits in ((), (1.0,), (0.0, math.nan), (0.0, 1.0, 9.0), (0.0, math.inf)):
        breaker = StreamBreaker(policy(2.0), num_prompt_tokens=1)
        breaker.update(np.array(logits, np.float32).reshape(-1, 1))
        json.dumps(breaker.report().to_json(), allow_nan=False)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30),
    st.lists(st.integers(1, 7), min_size=1, max_size=30),
    st.integers(0, 30),
)
def test_verdict_does_not_depend_on_chunks(
    logits: list[float], sizes: list[int], num_prompt_tokens: int
) -> None:
    logit_T1 = column(*logits)
    whole = StreamBreaker(policy(2.5), num_prompt_tokens)
    whole.update(logit_T1)
    parts = StreamBreaker(policy(2.5), num_prompt_tokens)
    start = 0
    while start < len(logit_T1):
        size = sizes[start % len(sizes)]
        parts.update(logit_T1[start : start + size])
        start += size
    assert parts.trip == whole.trip
    assert parts.report() == whole.report()
    assert parts.phase_peaks == whole.phase_peaks
    assert parts.probe_peaks == whole.probe_peaks


@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_report_carries_mode(mode: Mode) -> None:
    assert StreamBreaker(policy(1.0, mode=mode), 1).report().mode == mode


PROMPT_ONLY = policy(2.0, phases=frozenset({"prompt"}))
COMPLETION_ONLY = policy(2.0, phases=frozenset({"completion"}))


def test_a_phase_that_is_left_out_does_not_trip() -> None:
    both, prompt, completion = (
        StreamBreaker(p, num_prompt_tokens=3) for p in (policy(2.0), PROMPT_ONLY, COMPLETION_ONLY)
    )
    for breaker in (both, prompt, completion):
        breaker.update(column(0, 1, 5, 1, 6))
    assert [b.trip and b.trip.token_index for b in (both, prompt, completion)] == [2, 2, 4]
    late = StreamBreaker(PROMPT_ONLY, num_prompt_tokens=3)
    for logit in (0, 1, 1, 9):
        late.update(column(logit))
    assert late.trip is None
    # What the report calls the highest score is one that was judged.
    assert late.report().score == 1.0
    assert late.phase_peaks == {"prompt": 1.0, "completion": 9.0}


def test_a_completion_that_is_judged_alone_starts_its_scores_afresh() -> None:
    breaker = StreamBreaker(COMPLETION_ONLY, num_prompt_tokens=2)
    breaker.update(column(9, 9))
    assert breaker.report().score is None
    breaker.update(column(1.5))
    assert breaker.trip is None
    assert breaker.report().score == 1.5


@pytest.mark.parametrize("of", [PROMPT_ONLY, COMPLETION_ONLY])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_token_without_a_score_trips_in_every_phase(of: Policy, at: int) -> None:
    logit_T1 = np.zeros((5, 1), np.float32)
    logit_T1[at] = math.nan
    trip = StreamBreaker(of, num_prompt_tokens=2).update(logit_T1)
    assert trip is not None and trip.token_index == at and math.isnan(trip.score)


def test_a_probe_that_is_not_judged_does_not_trip_and_is_not_reported() -> None:
    breaker = StreamBreaker(policy(2.0, 2.0, judged=frozenset({"probe1"})), num_prompt_tokens=1)
    assert breaker.report().threshold == 2.0
    breaker.update(np.array([[0, 0], [9, 1]], np.float32))
    report = breaker.report()
    assert (report.tripped, report.probe, report.score) == (False, "probe1", 1.0)
    assert breaker.thresholds == {"probe1": 2.0}, "an infinite one is no JSON"
    trip = breaker.update(np.array([[0, math.inf]], np.float32))
    assert trip is not None and math.isfinite(trip.threshold)
    json.dumps(breaker.report().to_json(), allow_nan=False)
