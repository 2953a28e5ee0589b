"""Averaging before the dot product against the shared aggregation, and fits with known answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import DataError
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.activations import ResidualRows
from circuit_breakers_training.probe_fit import (
    collect_fit_tokens,
    fit_probe,
    running_mean,
    token_logits,
)
from circuit_breakers_training.render import Rendered

linear_aggregations = st.one_of(
    st.builds(
        lambda alpha, skip: Aggregation(kind="ema", alpha=alpha, skip_tokens=skip),
        st.floats(0.01, 1.0),
        st.integers(1, 3),
    ),
    st.builds(
        lambda window, skip: Aggregation(kind="rolling_mean", window=window, skip_tokens=skip),
        st.integers(1, 20),
        st.integers(1, 3),
    ),
)


class FixedReader:
    """Stands where a model would: given hidden states, read out of order as a batcher does."""

    def __init__(self, hidden: Sequence[np.ndarray], layers: tuple[int, ...]) -> None:
        self.hidden = hidden
        self.layers = layers

    def read(self, rows: Sequence[Rendered], *, progress: Any = None) -> Iterator[ResidualRows]:
        for index in reversed(range(len(rows))):
            yield ResidualRows(index, self.hidden[index])


@given(linear_aggregations, st.integers(0, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_probe_on_the_mean_is_the_mean_of_the_probe(
    aggregation: Aggregation, num_tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    hidden_TD = rng.normal(0, 3, (num_tokens, 5)).astype(np.float32)
    weight_D = rng.normal(size=5).astype(np.float32)
    served_T = aggregate(hidden_TD @ weight_D + 0.5, aggregation)[aggregation.skip_tokens :]
    fitted_T = running_mean(hidden_TD, aggregation) @ weight_D + 0.5
    np.testing.assert_allclose(fitted_T, served_T, atol=1e-4)


def test_maximum_is_fitted_on_single_tokens() -> None:
    hidden_TD = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert np.array_equal(running_mean(hidden_TD, Aggregation(kind="max")), hidden_TD[1:])


def test_fit_minimises_the_weighted_logistic_loss() -> None:
    rng = np.random.default_rng(0)
    harmful_N = rng.random(300) < 0.4
    hidden_ND = (rng.normal(size=(300, 3)) * [1, 10, 0.1] + harmful_N[:, None]).astype(np.float32)
    weight_N = rng.random(300).astype(np.float32) + 0.5
    fitted = fit_probe(hidden_ND, harmful_N, weight_N, inverse_l2=0.05)

    scaled_ND = (hidden_ND - hidden_ND.mean(0)) / hidden_ND.std(0)
    sign_N = np.where(harmful_N, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> float:
        logit_N = scaled_ND @ parameters[:3] + parameters[3]
        losses = weight_N * np.logaddexp(0, -sign_N * logit_N)
        return float(0.05 * losses.sum() + 0.5 * (parameters[:3] ** 2).sum())

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    expected_N = scaled_ND @ best[:3] + best[3]
    np.testing.assert_allclose(hidden_ND @ fitted.weight_D + fitted.bias, expected_N, atol=5e-3)


def test_feature_that_never_varies_gets_a_finite_weight() -> None:
    rng = np.random.default_rng(0)
    hidden_ND = np.concatenate([rng.normal(size=(50, 1)), np.full((50, 1), 7.0)], axis=1)
    harmful_N = hidden_ND[:, 0] > 0
    fitted = fit_probe(
        hidden_ND.astype(np.float32), harmful_N, np.ones(50, np.float32), inverse_l2=1.0
    )
    assert np.isfinite(fitted.weight_D).all()
    assert (hidden_ND @ fitted.weight_D + fitted.bias > 0).mean() < 0.8


def _conversations(num_each: int, seed: int = 0) -> tuple[list[Rendered], list[bool], list[Any]]:
    """Harmful ones point along feature 0 after four shared opening tokens."""
    rng = np.random.default_rng(seed)
    rows, harmful, hidden = [], [], []
    for i in range(2 * num_each):
        num_tokens = int(rng.integers(8, 40))
        ids = (1, 2, 3, 4, *rng.integers(5, 99, num_tokens - 4).tolist())
        hidden_TLD = rng.normal(size=(num_tokens, 2, 6)).astype(np.float32)
        hidden_TLD[4:, :, 0] += 1.0 if i % 2 else -1.0
        hidden_TLD[:4] = np.arange(4)[:, None, None]
        rows.append(Rendered(ids=ids, num_prompt_tokens=6))
        harmful.append(bool(i % 2))
        hidden.append(hidden_TLD)
    return rows, harmful, hidden


AGGREGATIONS = (Aggregation(kind="max"), Aggregation(kind="rolling_mean", window=4))


def test_labels_and_conversations_weigh_the_same() -> None:
    rows, harmful, hidden = _conversations(20)
    rows, harmful, hidden = rows[:30], harmful[:30], hidden[:30]
    tokens = collect_fit_tokens(
        FixedReader(hidden, (3, 5)),  # type: ignore[arg-type]
        rows,
        harmful,
        aggregations=AGGREGATIONS,
        tokens_per_conversation=6,
        seed=0,
    )
    assert tokens.hidden_NLAD.shape[1:] == (2, 2, 6)
    assert tokens.weight_N.mean() == pytest.approx(1)
    opening = len(tokens.weight_N) - 3  # positions 1 to 3; position 0 is skipped
    benign = tokens.weight_N[:opening][~tokens.harmful_N[:opening]].sum()
    assert tokens.weight_N[tokens.harmful_N].sum() == pytest.approx(benign, rel=1e-5)
    assert not tokens.harmful_N[opening:].any()


def test_opening_tokens_enter_once_and_as_benign() -> None:
    rows, harmful, hidden = _conversations(5)
    tokens = collect_fit_tokens(
        FixedReader(hidden, (3, 5)),  # type: ignore[arg-type]
        rows,
        harmful,
        aggregations=AGGREGATIONS,
        tokens_per_conversation=99,
        seed=0,
    )
    assert np.array_equal(tokens.hidden_NLAD[-3:, 0, 0, 0], [1, 2, 3])
    assert len(tokens.harmful_N) == sum(len(row.ids) - 4 for row in rows) + 3


def test_draw_does_not_depend_on_reading_order() -> None:
    rows, harmful, hidden = _conversations(5)

    class Forward(FixedReader):
        def read(self, rows: Sequence[Rendered], *, progress: Any = None) -> Iterator[ResidualRows]:
            return reversed(list(super().read(rows)))

    drawn = [
        collect_fit_tokens(
            reader,  # type: ignore[arg-type]
            rows,
            harmful,
            aggregations=AGGREGATIONS,
            tokens_per_conversation=3,
            seed=4,
        )
        for reader in (FixedReader(hidden, (3, 5)), Forward(hidden, (3, 5)))
    ]
    ordered = [np.sort(tokens.hidden_NLAD[:, 0, 1, 0]) for tokens in drawn]
    assert np.array_equal(*ordered)


def test_fitted_probe_separates_held_out_conversations() -> None:
    rows, harmful, hidden = _conversations(40)
    tokens = collect_fit_tokens(
        FixedReader(hidden, (3, 5)),  # type: ignore[arg-type]
        rows,
        harmful,
        aggregations=AGGREGATIONS,
        tokens_per_conversation=8,
        seed=0,
    )
    probe = fit_probe(
        tokens.hidden_NLAD[:, 1, 1], tokens.harmful_N, tokens.weight_N, inverse_l2=0.01
    )
    rows, harmful, hidden = _conversations(40, seed=1)
    logits = token_logits(FixedReader(hidden, (3, 5)), rows, [(5, probe)])  # type: ignore[arg-type]
    assert [x.shape for x in logits] == [(len(row.ids), 1) for row in rows]
    score = np.array([aggregate(x[:, 0], AGGREGATIONS[1])[-1] for x in logits])
    # Means of four tokens lie at +-1 with a standard deviation of 0.5: Phi(2 / 0.71) is 0.998.
    assert roc_auc_score(harmful, score) > 0.98


def test_one_label_alone_is_refused() -> None:
    rows, _, hidden = _conversations(2)
    with pytest.raises(DataError, match="got 4 harmful of 4"):
        collect_fit_tokens(
            FixedReader(hidden, (3, 5)),  # type: ignore[arg-type]
            rows,
            [True] * 4,
            aggregations=AGGREGATIONS,
            tokens_per_conversation=4,
            seed=0,
        )
