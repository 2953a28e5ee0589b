"""Fits with known answers, and logits as serving adds them up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.probe import fit
from circuit_breakers_training.probe.fit import fit_probe, token_logits
from circuit_breakers_training.probe.fit_tokens import collect_fit_tokens
from circuit_breakers_training.render import Rendered

from .fixed_reader import FixedReader, opposite_conversations


def test_fit_minimises_the_weighted_logistic_loss() -> None:
    rng = np.random.default_rng(0)
    harmful_N = rng.random(300) < 0.4
    hidden_ND = (rng.normal(size=(300, 3)) * [1, 10, 0.1] + harmful_N[:, None]).astype(np.float32)
    weight_N = rng.random(300).astype(np.float32) + 0.5
    fitted = fit_probe(hidden_ND.copy(), harmful_N, weight_N, inverse_l2=0.05)

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


def test_layers_side_by_side_get_a_row_of_weights_each() -> None:
    rng = np.random.default_rng(0)
    harmful_N = rng.random(200) < 0.5
    hidden_ND = rng.normal(size=(200, 6)).astype(np.float32)
    hidden_ND[:, 4] += 2 * harmful_N  # feature 1 of the second layer
    weight_N = np.ones(200, np.float32)
    one_row = fit_probe(hidden_ND.copy(), harmful_N, weight_N, inverse_l2=0.1)
    fitted = fit_probe(hidden_ND.copy(), harmful_N, weight_N, inverse_l2=0.1, num_layers=2)
    assert fitted.weight_D.shape == (2, 3)
    assert np.array_equal(fitted.weight_D.ravel(), one_row.weight_D)
    assert np.abs(fitted.weight_D).argmax() == 4


def test_standardisation_does_not_depend_on_how_rows_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    # Far from zero, where sums of squares in float32 would have nothing left of the variance.
    hidden_ND = (rng.normal(size=(100, 3)) + np.array([0, 1e4, -1e5])).astype(np.float32)
    scale_D = hidden_ND.std(axis=0, dtype=np.float64)
    expected_ND = (hidden_ND - hidden_ND.mean(axis=0, dtype=np.float64)) / scale_D
    harmful_N = rng.random(100) < 0.5
    for rows_at_once in (4096, 7):
        monkeypatch.setattr(fit, "_ROWS_AT_ONCE", rows_at_once)
        standardised_ND = hidden_ND.copy()
        fit_probe(standardised_ND, harmful_N, np.ones(100, np.float32), inverse_l2=0.1)
        # The scale has 1e-6 added to it.
        np.testing.assert_allclose(standardised_ND, expected_ND, atol=1e-5)


def test_logits_are_the_sum_over_the_layers() -> None:
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(n, 3, 4)).astype(np.float32) for n in (5, 2)]
    rows = [Rendered(ids=tuple(range(n)), num_prompt_tokens=1) for n in (5, 2)]
    alone = ProbeWeights(rng.normal(size=4).astype(np.float32), 0.5)
    together = ProbeWeights(rng.normal(size=(2, 4)).astype(np.float32), -1.0)
    logits = token_logits(
        FixedReader(hidden, (2, 3, 7)),  # type: ignore[arg-type]
        rows,
        [((3,), alone), ((2, 7), together)],
    )
    for logit_TP, hidden_TLD in zip(logits, hidden, strict=True):
        one_T = hidden_TLD[:, 1] @ alone.weight_D + 0.5
        two_T = hidden_TLD[:, 0] @ together.weight_D[0] + hidden_TLD[:, 2] @ together.weight_D[1]
        np.testing.assert_allclose(logit_TP, np.stack([one_T, two_T - 1.0], axis=1), atol=1e-5)


def test_fitted_probe_separates_held_out_conversations(tmp_path: Path) -> None:
    mean = Aggregation(kind="rolling_mean", window=4)
    rows, harmful, hidden = opposite_conversations(40)
    tokens = collect_fit_tokens(
        FixedReader(hidden, (3, 5)),  # type: ignore[arg-type]
        rows,
        harmful,
        directory=tmp_path,
        aggregations=[mean],
        tokens_per_conversation=8,
        seed=0,
    )
    rows, harmful, hidden = opposite_conversations(40, seed=1)
    for layers in ((5,), (3, 5)):
        probe = fit_probe(
            tokens.hidden(layers, mean),
            tokens.harmful_N,
            tokens.weight_N,
            inverse_l2=0.01,
            num_layers=len(layers),
        )
        logits = token_logits(FixedReader(hidden, (3, 5)), rows, [(layers, probe)])  # type: ignore[arg-type]
        assert [x.shape for x in logits] == [(len(row.ids), 1) for row in rows]
        score = np.array([aggregate(x[:, 0], mean)[-1] for x in logits])
        # Means of four tokens lie at +-1 with a standard deviation of 0.5: Phi(2 / 0.71) is 0.998.
        assert roc_auc_score(harmful, score) > 0.98
