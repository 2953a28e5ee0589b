"""The benign conversations whose representations an adapter leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable

from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["retain_set"]


def retain_set(conversations: Iterable[Conversation], recipe: Recipe) -> list[Conversation]:
    """The benign ones, in their order; without written refusals if the recipe retains none.

    Those have the source "refusal", as `data build` and the published file give it. The kind of
    that name is wider: it has all harmless answers to harmful requests.
    """
    benign = (c for c in conversations if c.label == "benign")
    return [c for c in benign if recipe.objective.retain_refusals or c.source != "refusal"]
