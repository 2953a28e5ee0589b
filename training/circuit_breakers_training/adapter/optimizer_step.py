"""One optimiser step on one batch of both kinds of conversations, split however it has to be.

A step's batch is shared out over processes, and a share is run in parts. Losses are weighted by the
counted tokens of the whole batch, so that the update depends on neither split.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.batch_losses import batch_losses, count_tokens
from circuit_breakers_training.adapter.objective import coefficients
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered
from circuit_breakers_training.run_log import peak_rss_mib

__all__ = ["StepPart", "learning_rate", "not_finite", "split_step", "take_step"]


class StepPart(NamedTuple):
    """Rows that one process runs at once."""

    retain: list[Rendered]
    harmful: list[Rendered]
    counts: bool
    """False: a stand-in of a process without rows, as the others wait for it in each part."""


def split_step(
    recipe: Recipe, processes: Processes, retain: Sequence[Rendered], harmful: Sequence[Rendered]
) -> list[StepPart]:
    """This process's parts of a step: as many in every process, each with rows of both kinds."""
    assert len(retain) == len(harmful) > 0
    largest_share = -(-len(retain) // processes.count)
    size = recipe.micro_batch_size or largest_share
    mine = (processes.share(retain), processes.share(harmful))
    parts = []
    for start in range(0, largest_share, size):
        kinds = [rows[start : start + size] for rows in mine]
        if kinds[0]:
            parts.append(StepPart(kinds[0], kinds[1], counts=True))
        else:
            # The shortest rows, as they are sorted by length.
            parts.append(StepPart([retain[0]], [harmful[0]], counts=False))
    return parts


def take_step(
    recipe: Recipe,
    model: ParallelStreams,
    retain: Sequence[Rendered],
    harmful: Sequence[Rendered],
    step: int,
) -> dict[str, Any]:
    """Do optimiser step number `step`, counted from 0, on the whole batch; returns its metrics.

    Args:
        retain: the benign rows of all processes.
        harmful: the harmful ones.
    Raises:
        ConfigError: the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    totals = count_tokens(recipe, retain, harmful)
    parts = split_step(recipe, model.processes, retain, harmful)
    rate = learning_rate(recipe, step)
    model.set_learning_rate(rate)
    sums = torch.zeros(5, dtype=torch.float64)
    padded_tokens = 0
    for number, part in enumerate(parts):
        # Dropout depends on nothing that a checkpoint would have to keep.
        torch.manual_seed(_dropout_seed(recipe.seed, step, model.processes.index, number))
        with model.part(last=number + 1 == len(parts)) as backward:
            compute = partial(batch_losses, recipe, model.streams, part.retain, part.harmful, step)
            losses = model.inside(partial(compute, totals=totals))
            backward(losses.loss if part.counts else losses.loss * 0)
        if part.counts:
            sums += torch.stack([x.detach().double() for x in losses[:5]]).cpu()
            padded_tokens += losses.padded_tokens
    loss, retain_loss, reroute_loss, retain_cosine, reroute_cosine, padded = model.processes.add_up(
        [*sums.tolist(), padded_tokens]
    )
    if not math.isfinite(loss):
        raise not_finite(recipe, f"the loss is {loss}", step)
    # Read back before the step rather than after it, so that it cannot harm the adapter.
    grad_norm = model.clip_gradients()
    if not math.isfinite(grad_norm):
        raise not_finite(recipe, f"the norm of the gradient is {grad_norm}", step)
    model.update()
    scale = coefficients(step, recipe.steps, recipe.objective.alpha)
    num_tokens = sum(len(row.ids) for row in (*retain, *harmful))
    return {
        "step": step + 1,
        "loss": loss,
        "retain_loss": retain_loss,
        "reroute_loss": reroute_loss,
        "retain_cosine": retain_cosine,
        "reroute_cosine": reroute_cosine,
        "retain_coefficient": scale.retain,
        "reroute_coefficient": scale.reroute,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "num_tokens": num_tokens,
        "padding_share": 1 - num_tokens / padded,
        "seconds": time.perf_counter() - started,
        "peak_rss_mib": peak_rss_mib(),
    }


def not_finite(recipe: Recipe, what: str, step: int) -> ConfigError:
    """The error of a run that optimiser step number `step`, counted from 0, has lost."""
    return ConfigError(
        f"{what} at step {step + 1}, expected a finite number; lower learning_rate (now "
        f"{recipe.learning_rate}) or use precision fp32, and train into another output directory"
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of optimiser step number `step`, counted from 0."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _dropout_seed(seed: int, step: int, process: int, part: int) -> int:
    """Unrelated for neighbouring numbers, which generators are not seeded well with."""
    digest = hashlib.sha256(f"{seed} {step} {process} {part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
