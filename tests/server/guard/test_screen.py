"""Screening: a token that may make its stream trip is never passed over."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from circuit_breakers.guard.screen import Screen

THRESHOLDS = (2.0, -1.0, 0.0)
SCREEN = Screen.below(THRESHOLDS)

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
    may_trip_N = SCREEN.may_trip(logit_NK)
    assert SCREEN.is_harmless(logit_NK) == (not may_trip_N.any())
    # A hair below a threshold may be called suspect; at it or above, it must be.
    assert all(may for may, trips in zip(may_trip_N, expected_N, strict=True) if trips)
    assert not SCREEN.may_trip(np.full((4, 3), -1.5, np.float32)).any()


@pytest.mark.parametrize("num_tokens", [1, 500])
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf, 2.0])
def test_one_bad_logit_is_found_in_small_and_large_steps(num_tokens: int, logit: float) -> None:
    logit_NK = np.full((num_tokens, 3), -5.0, np.float32)
    assert SCREEN.is_harmless(logit_NK)
    logit_NK[-1, 0] = logit
    assert not SCREEN.is_harmless(logit_NK)
    assert SCREEN.may_trip(logit_NK).tolist() == [False] * (num_tokens - 1) + [True]


def test_a_probe_that_is_not_judged_makes_only_a_missing_score_suspect() -> None:
    screen = Screen.below([2.0, None])
    assert screen.is_harmless(np.array([[1, 1e30]], np.float32))
    assert not screen.is_harmless(np.array([[2, 0]], np.float32))
    for bad in (math.nan, math.inf, -math.inf):
        assert not screen.is_harmless(np.array([[1, bad]], np.float32))


@given(
    st.lists(st.tuples(*[st.none() | st.floats(-4, 4)] * 2), min_size=1, max_size=4),
    arrays(np.float32, (6, 2), elements=st.floats(-5, 5, width=32) | st.just(math.nan)),
)
def test_the_strictest_screen_passes_what_every_one_passes(
    thresholds: list[tuple[float | None, float | None]], logit_NK: np.ndarray
) -> None:
    screens = [Screen.below(pair) for pair in thresholds]
    expected_N = np.any([screen.may_trip(logit_NK) for screen in screens], axis=0)
    strictest = Screen.strictest(screens)
    assert strictest.may_trip(logit_NK).tolist() == expected_N.tolist()
    assert strictest.is_harmless(logit_NK) == (not expected_N.any())
