"""What an adapter does to conversations that it was not trained on: the gate of a training run.

Training losses cannot stand in for this: both can be low while benign text is broken.

C counted tokens, D model width
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_breakers_training.adapter.objective import cosines
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.batches import counted_tokens, padded_batch
from circuit_breakers_training.render import Rendered

__all__ = ["HeldoutCosine", "heldout_cosine"]


class HeldoutCosine(NamedTuple):
    """Mean over conversations of the mean cosine over target layers and response tokens."""

    overall: float | None
    """None without conversations."""
    by_source: dict[str, float]
    by_layer: dict[str, float]
    """By 0-based block, at every adapted one and every target."""


def heldout_cosine(
    model: ParallelStreams, rows: Sequence[Rendered], sources: Sequence[str], *, batch_size: int
) -> HeldoutCosine:
    """Cosine of adapted and base; 1 means untouched, 0 rerouted.

    Args:
        sources: where each row comes from, for the means by source.
        batch_size: rows run together; changes speed and memory alone.
    Returns:
        the same in every process.
    """
    streams = model.streams
    streams.set_dropout(False)
    # Both streams go through all of these blocks anyway.
    layers = sorted({*streams.adapted, *streams.targets})
    targets = [layers.index(layer) for layer in streams.targets]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = model.processes.share(batches)
    values: list[tuple[int, list[float]]] = []
    # All processes run the model as often, as they may have to gather it.
    for number in range(-(-len(batches) // model.processes.count)):
        chosen = mine[number] if number < len(mine) else batches[0]
        compute = partial(_cosines, streams, [rows[i] for i in chosen], layers)
        with torch.no_grad():
            cosines = model.inside(compute)
        if number < len(mine):
            values += zip(chosen, cosines, strict=True)
    everything = sorted(v for share in model.processes.gather(values) for v in share)
    by_source: dict[str, list[float]] = defaultdict(list)
    for index, of_layers in everything:
        by_source[sources[index]].append(fmean(of_layers[at] for at in targets))
    by_layer = zip(*(of_layers for _, of_layers in everything), strict=True)
    return HeldoutCosine(
        overall=fmean(v for of in by_source.values() for v in of) if everything else None,
        by_source={name: fmean(of) for name, of in sorted(by_source.items())},
        by_layer={str(layer): fmean(of) for layer, of in zip(layers, by_layer, strict=False)},
    )


def _cosines(
    streams: Streams, rows: Sequence[Rendered], layers: Sequence[int]
) -> list[list[float]]:
    """Mean cosine of each row at each of `layers`, ascending."""
    batch = padded_batch(rows, ["response"] * len(rows), streams.device)
    counts = [counted_tokens(row, "response") for row in rows]
    by_layer: list[Tensor] = []

    def observe(_layer: int, adapted_CD: Tensor, base_CD: Tensor) -> None:
        of_rows = cosines(adapted_CD, base_CD).split(counts)
        by_layer.append(torch.stack([of_row.mean() for of_row in of_rows]))

    streams.compare(batch, observe, layers=layers)
    values: list[list[float]] = torch.stack(by_layer, dim=1).tolist()
    return values
