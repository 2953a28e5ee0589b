"""Both losses of one batch: conversations to tokens, two streams, the losses at the right layers.

B conversations, T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.config import Recipe
from circuit_breakers_training.objective import (
    coefficients,
    mean_cosine,
    reroute_loss,
    retain_absolute,
    retain_relative,
)
from circuit_breakers_training.render import Rendered
from circuit_breakers_training.streams import Streams, StreamStates

__all__ = ["BatchLosses", "batch_losses"]


class BatchLosses(NamedTuple):
    """float32 scalars; only `loss` is differentiated."""

    loss: Tensor
    """Scheduled and weighted sum of the next two."""
    retain_loss: Tensor
    reroute_loss: Tensor
    retain_cosine: Tensor
    """Mean cosine at the targets over the counted tokens of the benign rows."""
    reroute_cosine: Tensor
    """The same for the harmful rows."""
    padded_tokens: int
    """Size of the batch, padding included."""


def batch_losses(
    recipe: Recipe,
    streams: Streams,
    retain: Sequence[Rendered],
    harmful: Sequence[Rendered],
    step: int,
) -> BatchLosses:
    """Losses of one batch of both kinds, run together, as they are weighted at `step`."""
    objective = recipe.objective
    padded = pad_rows(
        [*retain, *harmful],
        [objective.retain_tokens] * len(retain) + [objective.reroute_tokens] * len(harmful),
    )
    mask_BT = padded.mask_BT.to(streams.device)
    states = streams.forward(padded.ids_BT)
    benign = slice(0, len(retain))
    bad = slice(len(retain), None)
    retained = _rows(states, benign)
    at_targets = streams.at_targets(states)
    if objective.retain == "absolute":
        retain_loss = retain_absolute(*retained, mask_BT[benign])
    else:
        retain_loss = retain_relative(
            *retained, mask_BT[benign], smoothing=objective.retain_smoothing
        )
    reroute = reroute_loss(*_rows(at_targets, bad), mask_BT[bad])
    scale = coefficients(step, recipe.steps, objective.alpha)
    with torch.no_grad():
        retain_cosine = mean_cosine(*_rows(at_targets, benign), mask_BT[benign])
        reroute_cosine = mean_cosine(*_rows(at_targets, bad), mask_BT[bad])
    return BatchLosses(
        loss=scale.retain * objective.retain_weight * retain_loss + scale.reroute * reroute,
        retain_loss=retain_loss,
        reroute_loss=reroute,
        retain_cosine=retain_cosine,
        reroute_cosine=reroute_cosine,
        padded_tokens=padded.ids_BT.numel(),
    )


def _rows(states: StreamStates, rows: slice) -> StreamStates:
    return StreamStates([x[rows] for x in states.adapted], [x[rows] for x in states.base])
