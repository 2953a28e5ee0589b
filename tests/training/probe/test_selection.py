"""Candidates are rated on what trips when served, and the better one wins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message
from circuit_breakers_training.probe.fit_tokens import FitTokens
from circuit_breakers_training.probe.selection import (
    Candidate,
    Quality,
    best_candidate,
    candidate_layers,
    candidate_quality,
    expected_verdict,
    fit_candidates,
    score_quality,
)

MAX = Aggregation(kind="max")
MEAN = Aggregation(kind="rolling_mean", window=8)


def _conversation(label: Label, kind: Kind = "completion", category: str | None = None):  # type: ignore[no-untyped-def]
    messages = (Message("user", "q"), Message("assistant", "a"))
    return Conversation(
        messages=messages, label=label, source="s", category=category, group="g", kind=kind
    )


def test_refused_requests_are_neither_harmful_nor_benign() -> None:
    assert expected_verdict(_conversation("harmful", "prefilled")) == "harmful"
    assert expected_verdict(_conversation("benign")) == "benign"
    assert expected_verdict(_conversation("benign", "refusal")) == "refused"
    assert expected_verdict(_conversation("benign", category="after_refusal")) == "refused"


def test_quality_of_known_scores() -> None:
    harmful = np.array([False] * 4 + [True] * 4)
    perfect = score_quality(np.arange(8.0), harmful)
    assert perfect == Quality(1.0, 1.0, 1.0)
    # Of 16 pairs, the harmful score 1.5 loses against benign 2 and 3.
    mixed = score_quality(np.array([0, 1, 2, 3, 1.5, 5, 6, 7.0]), harmful)
    assert mixed.auroc == pytest.approx(14 / 16)
    assert mixed.tpr_at_1pct_fpr == pytest.approx(3 / 4)


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(DataError, match="got 0 harmful of 3"):
        score_quality(np.zeros(3), np.zeros(3, bool))


def test_each_candidate_is_rated_under_its_own_aggregation() -> None:
    # One loud token in a benign conversation: it fools the maximum, not the mean.
    rng = np.random.default_rng(0)
    harmful = [bool(i % 2) for i in range(40)]
    logits = []
    for label in harmful:
        logit_T = rng.normal(1.0 if label else -1.0, 0.1, 30).astype(np.float32)
        if not label:
            logit_T[20] = 5.0
        logits.append(np.stack([logit_T, logit_T], axis=1))
    weights = ProbeWeights(np.zeros(1, np.float32), 0.0)
    candidates = [Candidate((0,), MAX, weights), Candidate((0,), MEAN, weights)]
    qualities = candidate_quality(candidates, logits, harmful)
    assert qualities[0].auroc == 0.0
    assert qualities[1].auroc == 1.0
    assert best_candidate(qualities) == 1


def test_first_of_equal_candidates_is_kept() -> None:
    assert best_candidate([Quality(0.9, 0.8, 0.1), Quality(0.9, 0.8, 0.2)]) == 0


def test_layers_alone_come_before_layers_together() -> None:
    layers = (3, 5, 8)
    assert candidate_layers(layers, ()) == [(3,), (5,), (8,)]
    assert candidate_layers(layers, ("neighbours",)) == [(3,), (5,), (8,), (3, 5), (5, 8)]
    assert candidate_layers(layers, ("neighbours", "all"))[3:] == [(3, 5), (5, 8), (3, 5, 8)]
    # Of two layers, the neighbours are all; one layer has no company.
    assert candidate_layers((3, 5), ("neighbours", "all")) == [(3,), (5,), (3, 5)]
    assert candidate_layers((3,), ("neighbours", "all")) == [(3,)]


def test_candidates_come_in_the_order_of_layers_and_aggregations() -> None:
    rng = np.random.default_rng(0)
    harmful_N = np.arange(60) % 2 == 1
    hidden_NLAD = rng.normal(size=(60, 2, 2, 3)).astype(np.float32)
    # Only layer 8 under MEAN sees the label.
    hidden_NLAD[:, 1, 1, 2] += 3 * harmful_N

    class InMemory(FitTokens):
        def hidden(self, layers: Sequence[int], aggregation: Aggregation) -> np.ndarray:
            which = self.aggregations.index(aggregation)
            parts = [hidden_NLAD[:, self.layers.index(layer), which] for layer in layers]
            return np.concatenate(parts, axis=1)

    tokens = InMemory(
        directory=Path("none"),
        layers=(5, 8),
        aggregations=(MAX, MEAN),
        harmful_N=harmful_N,
        weight_N=np.ones(60, np.float32),
        row_N=np.arange(60),
    )
    candidates = list(fit_candidates(tokens, [(5,), (8,), (5, 8)], inverse_l2=0.1))
    assert [(c.layers, c.aggregation) for c in candidates] == [
        ((5,), MAX),
        ((5,), MEAN),
        ((8,), MAX),
        ((8,), MEAN),
        ((5, 8), MAX),
        ((5, 8), MEAN),
    ]
    strength = [float(np.abs(c.weights.weight_LD[-1, 2])) for c in candidates[:4]]
    assert strength.index(max(strength)) == 3
    # Read together, the weight lies on the layer that sees it.
    assert np.abs(candidates[5].weights.weight_LD).argmax() == 5
