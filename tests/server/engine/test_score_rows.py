from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.engine.score_rows import ScoreRows, nan_rows

_writes = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=20)


@given(_writes)
def test_rows_are_those_of_an_array_that_grows(writes: list[tuple[int, int]]) -> None:
    rows, expected_TP = ScoreRows(3), np.zeros((0, 3), np.float32)
    for i, (start, num_rows) in enumerate(writes):
        start = min(start, len(rows))
        new_TP = np.arange(num_rows * 3, dtype=np.float32).reshape(-1, 3) + 100 * i
        rows.write(start, new_TP.tobytes())
        expected_TP = np.concatenate([expected_TP[:start], new_TP, expected_TP[start + num_rows :]])
        assert len(rows) == len(expected_TP)
    assert np.array_equal(rows.array(0, len(rows)), expected_TP)
    assert np.array_equal(rows.array(2, 5), expected_TP[2:5])
    assert rows.raw(2, 5) == expected_TP[2:5].tobytes()


def test_an_array_outlives_later_writes() -> None:
    rows = ScoreRows(1)
    rows.write(0, nan_rows(2, 1))
    array_TP = rows.array(0, 2)
    rows.write(2, bytes(4))
    assert np.isnan(array_TP).all()
    assert len(rows) == 3


def test_a_gap_is_refused() -> None:
    with pytest.raises(AssertionError):
        ScoreRows(1).write(1, bytes(4))
