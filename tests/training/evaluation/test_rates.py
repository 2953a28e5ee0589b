from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from circuit_breakers_training.evaluation.rates import Rate, clopper_pearson, rate


@pytest.mark.parametrize(
    ("count", "num", "low", "high"),
    [
        # 1 - 0.025 ** (1 / 10), by hand: the bound of no success has a closed form.
        (0, 10, 0.0, 0.30850),
        (10, 10, 0.69150, 1.0),
        # R: binom.test(5, 10)$conf.int
        (5, 10, 0.18709, 0.81291),
    ],
)
def test_known_intervals(count: int, num: int, low: float, high: float) -> None:
    assert clopper_pearson(count, num) == pytest.approx((low, high), abs=1e-5)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_are_where_the_tails_hold_a_fortieth(counts: tuple[int, int]) -> None:
    count, num = counts
    low, high = clopper_pearson(count, num)
    assert low <= count / num <= high
    if count:
        assert binom.sf(count - 1, num, low) == pytest.approx(0.025, abs=1e-6)
    if count < num:
        assert binom.cdf(count, num, high) == pytest.approx(0.025, abs=1e-6)


def test_rate_of_nothing_says_nothing() -> None:
    assert rate([]) == Rate(0, 0, None, 0.0, 1.0)
    some = rate([True, False, True])
    assert (some.count, some.num, some.share) == (2, 3, 2 / 3)
