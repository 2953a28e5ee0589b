"""Limits come from the base model's texts, and hold for them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.errors import CalibrationError
from circuit_breakers_training.evaluation.degeneration import (
    DegenerateLimits,
    Fluency,
    calibrate_limits,
    measure_fluency,
    repeated_share,
)
from circuit_breakers_training.fluency import Loss

LIMITS = DegenerateLimits(
    max_nats_per_token=2.0,
    max_repeated=0.5,
    num_texts=100,
    num_empty=0,
    share=0.05,
    confidence=0.95,
)


def test_repetition_of_known_sequences() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(range(20)) == 0
    # Seven runs of four, all equal: six are repeated.
    assert repeated_share([5] * 10) == pytest.approx(6 / 7)
    # abababab: five runs, two different ones.
    assert repeated_share([1, 2] * 4) == pytest.approx(3 / 5)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_is_a_share_and_grows_with_a_copy(ids: list[int]) -> None:
    assert 0 <= repeated_share(ids) < 1
    if len(ids) >= 4:
        assert repeated_share(ids * 3) > repeated_share(ids) or repeated_share(ids * 3) > 0.4


@pytest.mark.parametrize(
    ("fluency", "degenerate"),
    [
        (Fluency(2.0, 0.5), False),
        (Fluency(2.1, 0.0), True),
        (Fluency(0.1, 0.6), True),
        (Fluency(math.nan, 0.0), True),
        (Fluency(math.inf, 0.0), True),
        (Fluency(None, None), True),
    ],
)
def test_a_text_above_a_limit_or_without_words_is_degenerate(
    fluency: Fluency, degenerate: bool
) -> None:
    assert LIMITS.degenerate(fluency) is degenerate


def test_fluency_is_the_mean_loss_of_a_token() -> None:
    assert measure_fluency(Loss(6.0, 3), [1, 2, 3]) == (2.0, 0.0)
    assert measure_fluency(Loss(0.0, 0), []) == (None, None)


def test_limits_leave_as_many_texts_above_as_the_share_supports() -> None:
    texts = [Fluency(float(i), i / 1000) for i in range(93)]
    random.Random(0).shuffle(texts)
    limits = calibrate_limits(texts, share=0.05)
    # One exceedance in 93 has an upper bound of 5.0 % (4.998 %), two have more.
    assert sum(limits.degenerate(f) for f in texts) == 1
    assert (limits.max_nats_per_token, limits.max_repeated) == (91.0, 0.091)
    assert (limits.num_texts, limits.num_empty) == (93, 0)


def test_fifty_nine_texts_support_five_percent_and_fewer_do_not() -> None:
    # 0.95 ** 59 < 0.05 < 0.95 ** 58
    texts = [Fluency(1.0, 0.0)] * 59
    assert calibrate_limits(texts, share=0.05).max_nats_per_token == 1.0
    with pytest.raises(CalibrationError, match=r"got 58 benign answers.*expected at least 59"):
        calibrate_limits([*texts[1:], Fluency(None, None)], share=0.05)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate_limits([Fluency(math.nan, 0.0)] * 80, share=0.05)
