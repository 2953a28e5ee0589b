"""What an adapter does to conversations that it was not trained on: the gate of a training run.

Training losses cannot stand in for this: both can be low while benign text is broken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch

from circuit_breakers_training.adapter.objective import mean_cosine
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.render import Rendered

__all__ = ["HeldoutCosine", "heldout_cosine"]


class HeldoutCosine(NamedTuple):
    """Mean over conversations of the mean cosine over layers and response tokens."""

    overall: float | None
    """None without conversations."""
    by_source: dict[str, float]
    by_layer: dict[str, float]
    """By 0-based block, of the target layers."""


def heldout_cosine(
    model: ParallelStreams, rows: Sequence[Rendered], sources: Sequence[str], *, batch_size: int
) -> HeldoutCosine:
    """Cosine of adapted and base at the target layers; 1 means untouched, 0 rerouted.

    Args:
        sources: where each row comes from, for the means by source.
        batch_size: rows run together; changes speed and memory alone.
    Returns:
        the same in every process.
    """
    model.streams.set_dropout(False)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = model.processes.share(batches)
    values: list[tuple[int, list[float]]] = []
    # All processes run the model as often, as they may have to gather it.
    for number in range(-(-len(batches) // model.processes.count)):
        chosen = mine[number] if number < len(mine) else batches[0]
        compute = partial(_cosines, model.streams, [rows[i] for i in chosen])
        with torch.no_grad():
            cosines = model.inside(compute)
        if number < len(mine):
            values += zip(chosen, cosines, strict=True)
    everything = sorted(v for share in model.processes.gather(values) for v in share)
    by_source: dict[str, list[float]] = defaultdict(list)
    for index, of_layers in everything:
        by_source[sources[index]].append(fmean(of_layers))
    by_layer = zip(*(of_layers for _, of_layers in everything), strict=True)
    return HeldoutCosine(
        overall=fmean(v for of in by_source.values() for v in of) if everything else None,
        by_source={name: fmean(of) for name, of in sorted(by_source.items())},
        by_layer={
            str(layer): fmean(of)
            for layer, of in zip(model.streams.targets, by_layer, strict=False)
        },
    )


def _cosines(streams: Streams, rows: Sequence[Rendered]) -> list[list[float]]:
    """Mean cosine of each row at each target layer."""
    padded = pad_rows(rows, ["response"] * len(rows))
    states = streams.at_targets(streams.forward(padded.ids_BT))
    mask_BT = padded.mask_BT.to(streams.device)
    values = []
    for b in range(len(rows)):
        one = slice(b, b + 1)
        values.append(
            [
                mean_cosine([adapted[one]], [base[one]], mask_BT[one]).item()
                for adapted, base in zip(states.adapted, states.base, strict=True)
            ]
        )
    return values
