"""What an adapter does to conversations that it was not trained on: the gate of a training run.

Training losses cannot stand in for this: both can be low while benign text is broken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.objective import mean_cosine
from circuit_breakers_training.render import Rendered
from circuit_breakers_training.streams import Streams

__all__ = ["HeldoutCosine", "heldout_cosine"]


class HeldoutCosine(NamedTuple):
    """Mean over conversations of the mean cosine over layers and response tokens."""

    overall: float | None
    """None without conversations."""
    by_source: dict[str, float]


def heldout_cosine(
    streams: Streams, rows: Sequence[Rendered], sources: Sequence[str], *, batch_size: int
) -> HeldoutCosine:
    """Cosine of adapted and base at the target layers; 1 means untouched, 0 rerouted.

    Args:
        sources: where each row comes from, for the means by source.
        batch_size: rows run together; changes speed and memory alone.
    """
    streams.set_dropout(False)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    by_source: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = pad_rows([rows[i] for i in chosen], ["response"] * len(chosen))
        with torch.no_grad():
            states = streams.at_targets(streams.forward(padded.ids_BT))
        mask_BT = padded.mask_BT.to(streams.device)
        for b, index in enumerate(chosen):
            one = slice(b, b + 1)
            cosine = mean_cosine(
                [x[one] for x in states.adapted], [x[one] for x in states.base], mask_BT[one]
            )
            by_source[sources[index]].append(cosine.item())
    everything = [value for values in by_source.values() for value in values]
    return HeldoutCosine(
        overall=sum(everything) / len(everything) if everything else None,
        by_source={name: sum(values) / len(values) for name, values in sorted(by_source.items())},
    )
