"""The linear probe: fitted on the very quantity that is compared with the threshold when served.

    hidden states ─ running mean of the aggregation ─ logistic regression ─ (weight, bias)

A rolling mean or an EMA of logits is the logit of the same mean of hidden states, as a probe is
linear. So the regression sees averaged hidden states, and what it separates is the running score
itself, not single tokens. Prompt and response tokens count alike, as both are scored when served.
Tokens that open every conversation (a default system prompt, the first header) cannot say anything
about it; they are fitted as benign, so that no conversation starts near the threshold.

N tokens of all conversations, T of one of them, L layers, A aggregations, D model width, P probes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from sklearn.linear_model import LogisticRegression

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers.errors import DataError
from circuit_breakers_training.activations import ResidualReader
from circuit_breakers_training.render import Rendered

__all__ = ["FitTokens", "collect_fit_tokens", "fit_probe", "running_mean", "token_logits"]

FloatArray = npt.NDArray[np.float32]

_OPENING_WEIGHT = 0.1
"""Total weight of the tokens that open every conversation, as a share of all others."""


class FitTokens(NamedTuple):
    """What a probe is fitted on."""

    hidden_NLAD: FloatArray
    """Running means of hidden states, by layer and aggregation."""
    harmful_N: npt.NDArray[np.bool_]
    weight_N: FloatArray
    """Mean 1; every conversation of a label weighs the same, and both labels do."""


def running_mean(hidden_TD: FloatArray, aggregation: Aggregation) -> FloatArray:
    """What the aggregation averages, before the dot product: float32, one row a scored token.

    For a linear aggregation, running_mean(h) @ w + b equals aggregate(h @ w + b) at every position
    that is not skipped. A maximum is not linear; its probe is fitted on single tokens.
    """
    scored_TD = hidden_TD[aggregation.skip_tokens :]
    if aggregation.kind == "max" or not len(scored_TD):
        return scored_TD
    if aggregation.kind == "ema":
        assert aggregation.alpha is not None
        # m[t] = m[t - 1] + alpha (h[t] - m[t - 1]), started at h[0].
        start_1D = (1 - aggregation.alpha) * scored_TD[:1]
        mean_TD, _ = lfilter(
            [aggregation.alpha], [1, aggregation.alpha - 1], scored_TD, axis=0, zi=start_1D
        )
        return np.asarray(mean_TD, np.float32)
    assert aggregation.window is not None
    sum_TD = np.cumsum(scored_TD, axis=0, dtype=np.float64)
    sum_TD[aggregation.window :] -= sum_TD[: -aggregation.window].copy()
    count_T1 = np.minimum(np.arange(1, len(scored_TD) + 1), aggregation.window)[:, None]
    return np.asarray(sum_TD / count_T1, np.float32)


def collect_fit_tokens(
    reader: ResidualReader,
    rows: Sequence[Rendered],
    harmful: Sequence[bool],
    *,
    aggregations: Sequence[Aggregation],
    tokens_per_conversation: int | None,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> FitTokens:
    """Averaged hidden states of some tokens of each conversation, prompt and response alike.

    Args:
        harmful: label of each row.
        tokens_per_conversation: drawn at random without replacement; neighbours are nearly equal
            once averaged, so a few dozen are as good as all (None).
        seed: decides the draw of each row, whatever the order in which rows are read.
    Raises:
        DataError: one of the labels is missing.
    """
    num_harmful = sum(harmful)
    if not 0 < num_harmful < len(rows):
        raise DataError(
            f"got {num_harmful} harmful of {len(rows)} conversations to fit the probe; expected "
            "both labels; add conversations of the other label to the train split"
        )
    skip = max(a.skip_tokens for a in aggregations)
    num_opening = _num_shared_tokens(rows)
    parts: list[tuple[FloatArray, bool, float]] = []
    opening: FloatArray | None = None
    for index, hidden_TLD in reader.read(rows, progress=progress):
        first = max(num_opening, skip)
        num_tokens = len(hidden_TLD)
        rng = np.random.default_rng((seed, index))
        candidates = np.arange(first, num_tokens)
        if not len(candidates):
            continue
        size = min(tokens_per_conversation or len(candidates), len(candidates))
        chosen = np.sort(rng.choice(candidates, size, replace=False))
        mean_TLAD = _all_means(hidden_TLD, aggregations, skip)
        share = num_harmful if harmful[index] else len(rows) - num_harmful
        parts.append((mean_TLAD[chosen - skip], harmful[index], 1 / (share * size)))
        if opening is None:
            opening = mean_TLAD[: max(num_opening - skip, 0)].copy()
    assert opening is not None
    if len(opening):
        parts.append((opening, False, 2 * _OPENING_WEIGHT / len(opening)))
    counts = [len(part) for part, _, _ in parts]
    weight_N = np.repeat([weight for _, _, weight in parts], counts)
    return FitTokens(
        np.concatenate([part for part, _, _ in parts]),
        np.repeat([label for _, label, _ in parts], counts),
        np.asarray(weight_N / weight_N.mean(), np.float32),
    )


def fit_probe(
    hidden_ND: FloatArray,
    harmful_N: npt.NDArray[np.bool_],
    weight_N: FloatArray,
    *,
    inverse_l2: float,
) -> ProbeWeights:
    """Logistic regression on standardised features, the standardisation folded in.

    Args:
        inverse_l2: scikit-learn's C, for features of unit variance and weights of mean 1.
    """
    mean_D = hidden_ND.mean(axis=0, dtype=np.float64)
    # A feature that never varies gets no weight instead of an infinite one.
    scale_D = hidden_ND.std(axis=0, dtype=np.float64) + 1e-6
    standardised_ND = np.asarray((hidden_ND - mean_D) / scale_D, np.float32)
    model = LogisticRegression(C=inverse_l2, max_iter=1000, tol=1e-4)
    model.fit(standardised_ND, harmful_N, sample_weight=weight_N)
    weight_D = np.asarray(model.coef_[0], np.float64) / scale_D
    return ProbeWeights(weight_D.astype(np.float32), float(model.intercept_[0] - weight_D @ mean_D))


def token_logits(
    reader: ResidualReader,
    rows: Sequence[Rendered],
    probes: Sequence[tuple[int, ProbeWeights]],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> list[FloatArray]:
    """Logits (T, P) of every token of each row under each probe, in the order of `rows`.

    Args:
        probes: layer and weights of each probe; the reader must read these layers.
    """
    column = [reader.layers.index(layer) for layer, _ in probes]
    logits: list[FloatArray] = [np.empty((0, 0), np.float32)] * len(rows)
    for index, hidden_TLD in reader.read(rows, progress=progress):
        logits[index] = np.stack(
            [
                hidden_TLD[:, at] @ weights.weight_D + np.float32(weights.bias)
                for at, (_, weights) in zip(column, probes, strict=True)
            ],
            axis=1,
        )
    return logits


def _all_means(
    hidden_TLD: FloatArray, aggregations: Sequence[Aggregation], skip: int
) -> FloatArray:
    """Running means (T - skip, L, A, D)."""
    num_tokens, num_layers, width = hidden_TLD.shape
    flat = hidden_TLD.reshape(num_tokens, num_layers * width)
    means = [running_mean(flat, a)[skip - a.skip_tokens :] for a in aggregations]
    return np.stack([mean.reshape(num_tokens - skip, num_layers, width) for mean in means], axis=2)


def _num_shared_tokens(rows: Sequence[Rendered]) -> int:
    """Length of the longest prefix that all rows have in common."""
    # Everything between the smallest and the largest sequence shares what these two share.
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    same = [a == b for a, b in zip(first, last, strict=False)]
    return (*same, False).index(False)
