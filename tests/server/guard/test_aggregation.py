from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.guard.aggregation import RunningScore, aggregate

KINDS = (
    Aggregation(kind="max"),
    Aggregation(kind="ema", alpha=0.25),
    Aggregation(kind="rolling_mean", window=3),
)
LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


def test_position_zero_is_left_out() -> None:
    for spec in KINDS:
        assert aggregate(np.array([1e6, 1.0], np.float32), spec).tolist() == [-np.inf, 1.0]


def test_values_by_hand() -> None:
    logit_T = np.array([99, 1, 3, 2, 8], np.float32)
    # max: running maximum of 1 3 2 8
    assert aggregate(logit_T, KINDS[0])[1:].tolist() == [1, 3, 3, 8]
    # ema .25: 1, 1+.25*2, 1.5+.25*.5, 1.625+.25*6.375
    assert aggregate(logit_T, KINDS[1])[1:].tolist() == [1, 1.5, 1.625, 3.21875]
    # rolling mean of 3: 1, (1+3)/2, (1+3+2)/3, (3+2+8)/3
    assert aggregate(logit_T, KINDS[2])[1:] == pytest.approx([1, 2, 2, 13 / 3])


@given(LOGITS, st.integers(0, 40), st.sampled_from(KINDS))
def test_chunks_do_not_matter(logits: list[float], cut: int, spec: Aggregation) -> None:
    logit_T = np.array(logits, np.float32)
    running = RunningScore(spec)
    parts = [running.update(logit_T[:cut]), running.update(logit_T[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), aggregate(logit_T, spec))


@given(LOGITS, st.integers(1, 39), st.sampled_from(KINDS))
def test_nan_poisons_the_rest(logits: list[float], at: int, spec: Aggregation) -> None:
    logit_T = np.array([*logits, *[0.0] * 40], np.float32)
    logit_T[at] = np.nan
    score_T = aggregate(logit_T, spec)
    # A rolling mean forgets the NaN after its window; StreamBreaker trips on the token itself.
    last = at + 1 if spec.kind == "rolling_mean" else len(score_T)
    assert np.isnan(score_T[at:last]).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "ema"},
        {"kind": "max", "alpha": 0.1},
        {"kind": "rolling_mean"},
        {"kind": "max", "skip_tokens": 0},
        {"kind": "median"},
    ],
)
def test_parameters_must_fit_the_kind(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Aggregation.model_validate(bad)
