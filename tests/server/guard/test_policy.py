"""Screening: a token that may make its stream trip is never passed over."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from circuit_breakers.artifact.manifest import Aggregation, Calibration, ProbeSpec
from circuit_breakers.guard.policy import Policy

CALIBRATION = Calibration(
    target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=256
)
THRESHOLDS = (2.0, -1.0, 0.0)
POLICY = Policy(
    breaker="test",
    probes=tuple(
        ProbeSpec(
            name=f"probe{k}",
            layer=k,
            aggregation=Aggregation(kind="max"),
            threshold_logit=threshold,
            calibration=CALIBRATION,
        )
        for k, threshold in enumerate(THRESHOLDS)
    ),
    mode="enforce",
)

LOGITS = st.one_of(
    st.floats(width=32),
    st.sampled_from([*THRESHOLDS, math.nan, math.inf, -math.inf, -5.0, -6.0]),
)


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=80).map(lambda s: (*s, 3)),
        elements=LOGITS,
        fill=st.just(np.float32(-5.0)),
    )
)
def test_both_screens_agree_with_the_plain_rule(logit_NK: np.ndarray) -> None:
    expected_N = [
        any(
            not math.isfinite(logit) or logit >= threshold
            for logit, threshold in zip(logit_K, THRESHOLDS, strict=True)
        )
        for logit_K in logit_NK.tolist()
    ]
    may_trip_N = POLICY.may_trip(logit_NK)
    assert POLICY.is_harmless(logit_NK) == (not may_trip_N.any())
    # A hair below a threshold may be called suspect; at it or above, it must be.
    assert all(may for may, trips in zip(may_trip_N, expected_N, strict=True) if trips)
    assert not POLICY.may_trip(np.full((4, 3), -1.5, np.float32)).any()


@pytest.mark.parametrize("num_tokens", [1, 500])
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf, 2.0])
def test_one_bad_logit_is_found_in_small_and_large_steps(num_tokens: int, logit: float) -> None:
    logit_NK = np.full((num_tokens, 3), -5.0, np.float32)
    assert POLICY.is_harmless(logit_NK)
    logit_NK[-1, 0] = logit
    assert not POLICY.is_harmless(logit_NK)
    assert POLICY.may_trip(logit_NK).tolist() == [False] * (num_tokens - 1) + [True]
