"""The stability index against values computed by hand, and the window that it looks at."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.artifact import ScoreHistogram
from circuit_breakers.metrics.drift import MIN_REQUESTS, DriftWindow, stability_index

counts = st.lists(st.integers(0, 500), min_size=2, max_size=12)


def test_index_of_two_bins_by_hand() -> None:
    # 0.5 is added to each bin: shares 49.5/100 and 50.5/100 expected, 19.5/100 and 80.5/100
    # observed. (0.195 - 0.495) ln(0.195 / 0.495) = 0.3 * 0.93156 = 0.27947;
    # (0.805 - 0.505) ln(0.805 / 0.505) = 0.3 * 0.46628 = 0.13988.
    assert stability_index((49, 50), (19, 80)) == pytest.approx(0.41935, abs=1e-5)


def test_an_empty_bin_has_a_finite_index() -> None:
    # Shares 0.5/11 and 10.5/11 against 10.5/11 and 0.5/11: 2 * (10 / 11) * ln 21.
    assert stability_index((0, 10), (10, 0)) == pytest.approx(20 / 11 * math.log(21))


@given(counts)
def test_the_same_counts_have_index_0(same: list[int]) -> None:
    assert stability_index(same, same) == 0


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(0, 500), min_size=n, max_size=n)] * 2)
    )
)
def test_index_is_symmetric_and_never_negative(both: tuple[list[int], list[int]]) -> None:
    index = stability_index(*both)
    assert index >= 0
    assert stability_index(both[1], both[0]) == pytest.approx(index)


def test_a_score_on_an_edge_belongs_to_the_bin_above_it_as_in_calibration() -> None:
    window = DriftWindow(ScoreHistogram(edges=(0.0, 1.0), counts=(10, 10, 10)))
    for score in (-5.0, 0.0, 0.5, 1.0, 7.0):
        window.add(score)
    assert window.counts == (1, 2, 2)


def test_the_oldest_scores_leave_a_full_window() -> None:
    window = DriftWindow(ScoreHistogram(edges=(0.0,), counts=(10, 10)), size=3)
    for score in (-1.0, -1.0, 1.0, 1.0, 1.0):
        window.add(score)
    assert (window.counts, window.num_requests) == ((0, 3), 3)


def test_there_is_no_index_of_a_few() -> None:
    window = DriftWindow(ScoreHistogram(edges=(0.0,), counts=(10, 10)))
    for _ in range(MIN_REQUESTS - 1):
        window.add(1.0)
    assert math.isnan(window.index)
    window.add(1.0)
    assert window.index == stability_index((10, 10), (0, MIN_REQUESTS))
