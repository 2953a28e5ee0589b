"""Both losses of a batch, or of a part of one: rows to tokens, two streams, errors token by token.

C counted tokens, D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_breakers_training.adapter.objective import (
    coefficients,
    cosines,
    retain_errors_absolute,
    retain_errors_relative,
)
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.batches import counted_tokens
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered

__all__ = ["BatchLosses", "TokenCounts", "batch_losses", "count_tokens"]


class TokenCounts(NamedTuple):
    """Tokens that enter the mean of each loss."""

    retain: int
    reroute: int


class BatchLosses(NamedTuple):
    """float32 scalars; only `loss` is differentiated.

    Those of the parts of a batch, computed with the whole batch's token counts, add up to the
    batch's.
    """

    loss: Tensor
    """Scheduled and weighted sum of the next two."""
    retain_loss: Tensor
    """Mean over layers and counted tokens of the retain error."""
    reroute_loss: Tensor
    """Mean over targets and counted tokens of ReLU(cos), on the harmful rows."""
    retain_cosine: Tensor
    """Mean cosine at the targets over the counted tokens of the benign rows."""
    reroute_cosine: Tensor
    """The same for the harmful rows."""
    padded_tokens: int
    """Size of the batch, padding included; packed rows have less than 16 tokens of it."""


def count_tokens(
    recipe: Recipe, retain: Sequence[Rendered], harmful: Sequence[Rendered]
) -> TokenCounts:
    """Tokens of these rows that the recipe's losses count."""
    objective = recipe.objective
    return TokenCounts(
        retain=sum(counted_tokens(row, objective.retain_tokens) for row in retain),
        reroute=sum(counted_tokens(row, objective.reroute_tokens) for row in harmful),
    )


def batch_losses(
    recipe: Recipe,
    streams: Streams,
    retain: Sequence[Rendered],
    harmful: Sequence[Rendered],
    step: int,
    *,
    totals: TokenCounts | None = None,
) -> BatchLosses:
    """Losses of rows of both kinds, run together, as they are weighted at `step`.

    Either kind may be empty; its losses and its cosine are then 0.

    Args:
        totals: counts of the whole step, over all of its parts and processes, where these rows are
            a part of it. None: these rows are the whole step.
    """
    objective = recipe.objective
    counts = count_tokens(recipe, retain, harmful)
    totals = totals or counts
    assert totals.retain >= counts.retain and totals.reroute >= counts.reroute
    num_retained, num_targets = len(streams.layers), len(streams.targets)
    if objective.retain_layers == "targets":
        num_retained = num_targets
    retain_sum = reroute_sum = retain_cosine = reroute_cosine = torch.zeros(
        (), device=streams.device
    )

    def add(layer: int, adapted_CD: Tensor, base_CD: Tensor) -> None:
        nonlocal retain_sum, reroute_sum, retain_cosine, reroute_cosine
        (kept_CD, bent_CD), (kept_base_CD, bent_base_CD) = (
            x.split([counts.retain, counts.reroute]) for x in (adapted_CD, base_CD)
        )
        if counts.retain:
            if objective.retain == "absolute":
                errors_C = retain_errors_absolute(kept_CD, kept_base_CD)
            else:
                errors_C = retain_errors_relative(
                    kept_CD, kept_base_CD, smoothing=objective.retain_smoothing
                )
            retain_sum = retain_sum + errors_C.sum()
        if layer not in streams.targets:
            return
        if counts.reroute:
            cosine_C = cosines(bent_CD, bent_base_CD)
            reroute_sum = reroute_sum + cosine_C.relu().sum()
            reroute_cosine = reroute_cosine + cosine_C.detach().sum()
        if counts.retain:
            with torch.no_grad():
                retain_cosine = retain_cosine + cosines(kept_CD, kept_base_CD).sum()

    num_tokens = 0
    if not (retain or harmful):
        # A part without rows has a backward pass, too: its gradients are 0.
        retain_sum = torch.stack([p.sum() for p in streams.parameters.values()]).sum() * 0.0
    else:
        batch = streams.batch(
            [*retain, *harmful],
            [objective.retain_tokens] * len(retain) + [objective.reroute_tokens] * len(harmful),
        )
        num_tokens = batch.ids_BT.numel()
        streams.compare(batch, add)
    # A kind that the whole step lacks has sums of 0.
    retain_total, reroute_total = max(totals.retain, 1), max(totals.reroute, 1)
    retain_loss = retain_sum / (num_retained * retain_total)
    reroute_loss = reroute_sum / (num_targets * reroute_total)
    scale = coefficients(step, recipe.steps, objective.alpha)
    return BatchLosses(
        loss=scale.retain * objective.retain_weight * retain_loss + scale.reroute * reroute_loss,
        retain_loss=retain_loss,
        reroute_loss=reroute_loss,
        retain_cosine=retain_cosine / (num_targets * retain_total),
        reroute_cosine=reroute_cosine / (num_targets * reroute_total),
        padded_tokens=num_tokens,
    )
