"""Which conversations the probe is fitted on, and how many tokens of each, before any is read.

Datasets may hold a conversation several times, for the adapter to see it more often. Here it counts
once: the probe's labels weigh the same whatever their numbers, and every copy costs as much again.

D model width
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.probe.fit_tokens import num_shared_tokens
from circuit_breakers_training.probe.selection import candidate_layers, expected_verdict
from circuit_breakers_training.recipes.config import ProbeRecipe
from circuit_breakers_training.render import Rendered

__all__ = ["FitPlan", "TokenBytes", "plan_fit", "reduced_text", "token_bytes"]

_FLOAT32_BYTES = 4


class TokenBytes(NamedTuple):
    """What one token of a fit takes, bytes."""

    memory: int
    """Of the candidate that reads most blocks, while it is put together."""
    disk: int
    """Of all blocks under all aggregations."""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What is read and fitted."""

    kept: tuple[int, ...]
    """Places of the conversations in the sequence that was given: of equal ones the first."""
    num_repeats: int
    """Copies of these that are left out."""
    tokens_per_conversation: int
    """Tokens of each, or all that it has where these are fewer."""
    is_reduced: bool
    """Whether these are fewer than the recipe asks for, to stay within max_fit_gib."""
    num_tokens: int
    """Of all conversations, and those that open every one of them."""


def token_bytes(recipe: ProbeRecipe, *, num_layers: int, hidden_size: int) -> TokenBytes:
    """What one token takes in a fit on a model of `num_layers` blocks and width `hidden_size`."""
    layers = recipe.candidate_layers(num_layers)
    most = max(map(len, candidate_layers(layers, recipe.concatenations)))
    # Several blocks are copied side by side, one after another.
    num_parts = most + 1 if most > 1 else 1
    part = _FLOAT32_BYTES * hidden_size
    return TokenBytes(num_parts * part, len(layers) * len(recipe.aggregations) * part)


def plan_fit(
    conversations: Sequence[Conversation],
    rendered: Sequence[Rendered],
    recipe: ProbeRecipe,
    *,
    num_layers: int,
    hidden_size: int,
) -> FitPlan:
    """The fit of `recipe` on `conversations`, without those that are neither right nor wrong.

    Args:
        rendered: the token ids of each conversation.
        num_layers, hidden_size: of the model.
    Raises:
        ConfigError: not even one token of each conversation stays within max_fit_gib.
    """
    places: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for index, (conversation, row) in enumerate(zip(conversations, rendered, strict=True)):
        if expected_verdict(conversation) != "refused":
            places.setdefault((row.ids, conversation.label), []).append(index)
    kept = tuple(copies[0] for copies in places.values())
    skip = max(a.skip_tokens for a in recipe.aggregations)
    num_shared = num_shared_tokens([rendered[i] for i in kept]) if kept else 0
    num_opening = max(num_shared - skip, 0)
    lengths = [max(len(rendered[i].ids) - max(num_shared, skip), 0) for i in kept]

    def total(tokens_of_each: int) -> int:
        return num_opening + sum(min(tokens_of_each, length) for length in lengths)

    wanted = recipe.tokens_per_conversation or max(lengths, default=1)
    of_one = token_bytes(recipe, num_layers=num_layers, hidden_size=hidden_size).memory
    limit = int(recipe.max_fit_gib * 2**30) // of_one
    # The largest number whose total is within the limit.
    chosen = bisect_right(range(1, wanted + 1), limit, key=total)
    if not chosen:
        raise ConfigError(
            f"got probe.max_fit_gib {recipe.max_fit_gib:g}, which is {limit:,} tokens of "
            f"{of_one:,} bytes, for {len(kept):,} training conversations; expected one token of "
            f"each at least; set it to {total(1) * of_one / 2**30:.3g} or more, or lower the "
            "number of probe.candidate_depths"
        )
    return FitPlan(
        kept=kept,
        num_repeats=sum(map(len, places.values())) - len(kept),
        tokens_per_conversation=chosen,
        is_reduced=total(chosen) < total(wanted),
        num_tokens=total(chosen),
    )


def reduced_text(recipe: ProbeRecipe, plan: FitPlan) -> str:
    """That fewer tokens are fitted than asked for, in a line; empty where all of them are."""
    if not plan.is_reduced:
        return ""
    return (
        f"the probe is fitted on {plan.tokens_per_conversation} tokens of each of "
        f"{len(plan.kept):,} conversations, not {recipe.tokens_per_conversation or 'all'}: these "
        f"would take more memory than probe.max_fit_gib, {recipe.max_fit_gib:g}"
    )
