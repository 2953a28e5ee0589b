"""What a probe is fitted on: averaged hidden states of some tokens of each conversation, on disk.

    hidden states ─ running mean of each aggregation ─ some tokens ─ a file for each layer and mean

A rolling mean or an EMA of logits is the logit of the same mean of hidden states, as a probe is
linear. So the regression sees averaged hidden states, and what it separates is the running score
itself, not single tokens. Prompt and response tokens count alike, as both are scored when served.
Tokens that open every conversation (a default system prompt, the first header) cannot say anything
about it; they are fitted as benign, so that no conversation starts near the threshold.

All layers and means together are many times what one fit needs, so they are written as they come
and read back one candidate at a time.

N tokens of all conversations, T of one of them, L layers, D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import DataError
from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.render import Rendered

__all__ = ["OPENING", "FitTokens", "collect_fit_tokens", "num_shared_tokens", "running_mean"]

FloatArray = npt.NDArray[np.float32]

OPENING = -1

_OPENING_WEIGHT = 0.1
"""Total weight of the tokens that open every conversation, as a share of all others."""


@dataclass(frozen=True, kw_only=True)
class FitTokens:
    """Tokens to fit on; their hidden states stay on disk until a candidate asks for its own."""

    directory: Path
    layers: tuple[int, ...]
    aggregations: tuple[Aggregation, ...]
    harmful_N: npt.NDArray[np.bool_]
    weight_N: FloatArray
    """Mean 1; every conversation of a label weighs the same, and both labels do."""
    row_N: npt.NDArray[np.int64]
    """Place of each token's conversation in the sequence that was given; OPENING for the tokens
    that open all of them."""

    def of_rows(self, rows: Sequence[int]) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        """The tokens of some conversations, weighed as if there were no others.

        Returns:
            A mask over all tokens, and the weights of those that it keeps.
        Raises:
            DataError: one of the labels is missing among `rows`.
        """
        opening_N = self.row_N == OPENING
        keeps_N = np.isin(self.row_N, rows) | opening_N
        weight_N = np.where(keeps_N, self.weight_N, 0).astype(np.float64)
        for label in (True, False):
            its_N = (self.harmful_N == label) & ~opening_N
            if not weight_N[its_N].any():
                name = "harmful" if label else "benign"
                raise DataError(
                    f"got no {name} one among {len(rows)} conversations to fit the probe; expected "
                    "both labels; take more of them"
                )
            # Each label weighs what it did.
            weight_N[its_N] *= self.weight_N[its_N].sum() / weight_N[its_N].sum()
        weight_N = weight_N[keeps_N]
        return keeps_N, np.asarray(weight_N / weight_N.mean(), np.float32)

    def hidden(self, layers: Sequence[int], aggregation: Aggregation) -> FloatArray:
        """Running means of hidden states under one aggregation, a new float32 (N, L * D)."""
        which = self.aggregations.index(aggregation)
        hidden_ND: FloatArray | None = None
        for at, layer in enumerate(layers):
            path = _file(self.directory, self.layers.index(layer), which)
            part_ND = np.fromfile(path, np.float32).reshape(len(self.harmful_N), -1)
            if len(layers) == 1:
                return part_ND
            width = part_ND.shape[1]
            if hidden_ND is None:
                hidden_ND = np.empty((len(part_ND), len(layers) * width), np.float32)
            hidden_ND[:, at * width : (at + 1) * width] = part_ND
        assert hidden_ND is not None, "a candidate reads at least one layer"
        return hidden_ND


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
    directory: Path,
    aggregations: Sequence[Aggregation],
    tokens_per_conversation: int | None,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> FitTokens:
    """Averaged hidden states of some tokens of each conversation, prompt and response alike.

    Args:
        harmful: label of each row.
        directory: an empty one, for tokens * layers * aggregations * width * 4 bytes.
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
    num_opening = num_shared_tokens(rows)
    labels: list[bool] = []
    places: list[int] = []
    counts: list[int] = []
    weights: list[float] = []
    opening: list[FloatArray] | None = None
    with ExitStack() as stack:
        files = [
            stack.enter_context(_file(directory, at, which).open("xb"))
            for at in range(len(reader.layers))
            for which in range(len(aggregations))
        ]
        for index, hidden_TLD in reader.read(rows, progress=progress):
            candidates = np.arange(max(num_opening, skip), len(hidden_TLD))
            if not len(candidates):
                continue
            rng = np.random.default_rng((seed, index))
            size = min(tokens_per_conversation or len(candidates), len(candidates))
            chosen = np.sort(rng.choice(candidates, size, replace=False))
            means = [
                running_mean(hidden_TLD[:, at], a)[skip - a.skip_tokens :]
                for at in range(len(reader.layers))
                for a in aggregations
            ]
            for file, mean_TD in zip(files, means, strict=True):
                file.write(mean_TD[chosen - skip].tobytes())
            share = num_harmful if harmful[index] else len(rows) - num_harmful
            labels.append(harmful[index])
            places.append(index)
            counts.append(size)
            weights.append(1 / (share * size))
            if opening is None:
                opening = [mean_TD[: max(num_opening - skip, 0)].copy() for mean_TD in means]
        assert opening is not None
        if size := len(opening[0]):
            for file, mean_TD in zip(files, opening, strict=True):
                file.write(mean_TD.tobytes())
            labels.append(False)
            places.append(OPENING)
            counts.append(size)
            weights.append(2 * _OPENING_WEIGHT / size)
    weight_N = np.repeat(weights, counts)
    return FitTokens(
        directory=directory,
        layers=tuple(reader.layers),
        aggregations=tuple(aggregations),
        harmful_N=np.repeat(labels, counts),
        weight_N=np.asarray(weight_N / weight_N.mean(), np.float32),
        row_N=np.repeat(places, counts),
    )


def _file(directory: Path, layer: int, aggregation: int) -> Path:
    return directory / f"{layer}-{aggregation}.f32"


def num_shared_tokens(rows: Sequence[Rendered]) -> int:
    """Length of the longest prefix that all rows have in common."""
    # Everything between the smallest and the largest sequence shares what these two share.
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    same = [a == b for a, b in zip(first, last, strict=False)]
    return (*same, False).index(False)
