"""The loops that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.streams import Shortcuts
from circuit_breakers_training.bench.loops import Loop, OurLoop, PublishedLoop, PublishedOptions
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["ARMS", "OURS", "PUBLISHED", "Arm", "chosen_arms", "make_loop"]

OURS = "ours"
PUBLISHED = "published"
_HUNGRY = "published-unchecked"
"""Takes several times the memory of any other."""
_PUBLISHED_DROPOUT = 0.05
_MICRO_BATCH_SIZE = 2

Make = Callable[[Recipe, Path, torch.device], Loop]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    label: str
    make: Make


def _published(label: str, *, dropout: float | None = None, **options: Any) -> Arm:
    def make(recipe: Recipe, model_dir: Path, device: torch.device) -> Loop:
        if dropout is not None:
            recipe = _with_dropout(recipe, dropout)
        return PublishedLoop(recipe, model_dir, device, PublishedOptions(**options))

    return Arm(label=label, make=make)


def _without(label: str, **shortcuts: bool) -> Arm:
    def make(recipe: Recipe, model_dir: Path, device: torch.device) -> Loop:
        return OurLoop(recipe, model_dir, device, Shortcuts(**shortcuts))

    return Arm(label=label, make=make)


def _ours(label: str, *, dropout: float | None = None, **fields: Any) -> Arm:
    def make(recipe: Recipe, model_dir: Path, device: torch.device) -> Loop:
        if dropout is not None:
            recipe = _with_dropout(recipe, dropout)
        return OurLoop(recipe.model_copy(update=fields), model_dir, device)

    return Arm(label=label, make=make)


def _with_dropout(recipe: Recipe, dropout: float) -> Recipe:
    lora = recipe.lora.model_copy(update={"dropout": dropout})
    return recipe.model_copy(update={"lora": lora})


ARMS = {
    PUBLISHED: _published("the published loop, with the recipe's dropout"),
    "published-dropout": _published(
        "the published loop, with its dropout of 0.05", dropout=_PUBLISHED_DROPOUT
    ),
    "published-cut": _published("the published loop, upper blocks dropped", cut=True),
    "published-eager": _published("the published loop, plain attention", attention="eager"),
    _HUNGRY: _published("the published loop, no block run again in backward", checkpointing=False),
    "padding": _without("ours, rows padded", padding=False),
    "upper-blocks": _without("ours, blocks above the target run", upper_blocks=False),
    "lower-blocks-twice": _without(
        "ours, blocks below the adapter run for each stream", lower_blocks_twice=False
    ),
    "head": _without("ours, language-model head run on both streams", head=False),
    "fused-attention": _without("ours, torch's fused attention", fused_attention=False),
    "float32-weights": _without("ours, float32 weights under autocast", float32_weights=False),
    "dropout": _ours("ours, with the published dropout of 0.05", dropout=_PUBLISHED_DROPOUT),
    "micro-batches": _ours("ours, 2 rows of each kind at once", micro_batch_size=_MICRO_BATCH_SIZE),
    "checkpointing": _ours("ours, blocks run again in backward", gradient_checkpointing=True),
    "compile": _ours("ours, blocks compiled", compile=True),
}
"""All but ours, as it is; each is compared with that."""


def chosen_arms(names: Sequence[str]) -> tuple[str, ...]:
    """The arms of these names, each once; "all" stands for every one that memory allows anywhere.

    Raises:
        ConfigError: there is no such arm.
    """
    if unknown := sorted(set(names) - {*ARMS, "all"}):
        raise ConfigError(f"got arm {unknown[0]!r}, expected {', '.join(ARMS)} or all")
    every = [name for name in ARMS if name != _HUNGRY] if "all" in names else []
    return tuple(dict.fromkeys([*every, *(name for name in names if name != "all")]))


def make_loop(name: str, recipe: Recipe, model_dir: Path, device: torch.device) -> Loop:
    """The loop called `name`: ours, or one of ARMS."""
    if name == OURS:
        return OurLoop(recipe, model_dir, device)
    return ARMS[name].make(recipe, model_dir, device)
