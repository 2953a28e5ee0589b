"""The linear probe: fitted on the very quantity that is compared with the threshold when served.

    averaged hidden states (fit_tokens.py) ─ logistic regression ─ (weight, bias)

A probe of several layers is one regression on their hidden states side by side; served, each layer
adds its part to the logit.

N tokens of all conversations, T of one of them, L layers, D model width, P probes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.render import Rendered

__all__ = ["fit_probe", "probe_logits", "token_logits"]

FloatArray = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 4096
"""Rows that are worked on in float64; the whole would double the peak memory, and more."""


def fit_probe(
    hidden_ND: FloatArray,
    harmful_N: npt.NDArray[np.bool_],
    weight_N: FloatArray,
    *,
    inverse_l2: float,
    num_layers: int = 1,
) -> ProbeWeights:
    """Logistic regression on standardised features, the standardisation folded in.

    Args:
        hidden_ND: float32 (N, L * D), the layers side by side. Standardised in place, since a copy
            would double the peak memory.
        inverse_l2: scikit-learn's C, for features of unit variance and weights of mean 1.
        num_layers: L; weights are (D,) for 1 and (L, D) for more.
    """
    chunks = list(_chunks(hidden_ND))
    num_rows, width = hidden_ND.shape
    mean_D, variance_D = np.zeros(width), np.zeros(width)
    for chunk_ND in chunks:
        mean_D += chunk_ND.sum(axis=0, dtype=np.float64) / num_rows
    for chunk_ND in chunks:
        variance_D += np.square(chunk_ND - mean_D).sum(axis=0) / num_rows
    # A feature that never varies gets no weight instead of an infinite one.
    scale_D = np.sqrt(variance_D) + 1e-6
    for chunk_ND in chunks:
        chunk_ND[:] = (chunk_ND - mean_D) / scale_D
    model = LogisticRegression(C=inverse_l2, max_iter=1000, tol=1e-4)
    model.fit(hidden_ND, harmful_N, sample_weight=weight_N)
    weight_D = np.asarray(model.coef_[0], np.float64) / scale_D
    bias = float(model.intercept_[0] - weight_D @ mean_D)
    weight_LD = weight_D.astype(np.float32).reshape(num_layers, -1)
    return ProbeWeights(weight_LD[0] if num_layers == 1 else weight_LD, bias)


def token_logits(
    reader: ResidualReader,
    rows: Sequence[Rendered],
    probes: Sequence[tuple[Sequence[int], ProbeWeights]],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> list[FloatArray]:
    """Logits (T, P) of every token of each row under each probe, in the order of `rows`.

    Args:
        probes: layers and weights of each probe; the reader must read these layers.
    """
    columns = [[reader.layers.index(layer) for layer in layers] for layers, _ in probes]
    logits: list[FloatArray] = [np.empty((0, 0), np.float32)] * len(rows)
    for index, hidden_TLD in reader.read(rows, progress=progress):
        logits[index] = np.stack(
            [
                probe_logits(hidden_TLD, at, weights)
                for at, (_, weights) in zip(columns, probes, strict=True)
            ],
            axis=1,
        )
    return logits


def probe_logits(hidden_TLD: FloatArray, at: Sequence[int], weights: ProbeWeights) -> FloatArray:
    """Logit (T,) of every token.

    Args:
        at: where in `hidden_TLD` the probe's layers are, ascending.
    """
    # In the order of serving: the bias with the lowest layer, then the others upwards.
    logit_T = np.full(len(hidden_TLD), weights.bias, np.float32)
    for i, weight_D in zip(at, weights.weight_LD, strict=True):
        logit_T += hidden_TLD[:, i] @ weight_D
    return logit_T


def _chunks(hidden_ND: FloatArray) -> Iterator[FloatArray]:
    """Views of some rows each."""
    for start in range(0, len(hidden_ND), _ROWS_AT_ONCE):
        yield hidden_ND[start : start + _ROWS_AT_ONCE]
