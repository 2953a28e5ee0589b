"""Hidden states that are given, where a model would make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from circuit_breakers_training.probe.activations import ResidualRows
from circuit_breakers_training.render import Rendered

__all__ = ["FixedReader", "opposite_conversations"]


class FixedReader:
    """Stands where a model would: given hidden states, read out of order as a batcher does."""

    def __init__(self, hidden: Sequence[np.ndarray], layers: tuple[int, ...]) -> None:
        self.hidden = hidden
        self.layers = layers

    def read(self, rows: Sequence[Rendered], *, progress: Any = None) -> Iterator[ResidualRows]:
        for index in reversed(range(len(rows))):
            yield ResidualRows(index, self.hidden[index])


def opposite_conversations(
    num_each: int, seed: int = 0
) -> tuple[list[Rendered], list[bool], list[Any]]:
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
