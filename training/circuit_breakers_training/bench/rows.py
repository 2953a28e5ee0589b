"""Rows of the length that chats have: shipped prompts, answers of random tokens.

What a step costs depends on lengths, never on what the tokens say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.prompt_lists import twin_pairs
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered, load_tokenizer, render_prompt

__all__ = ["BenchRows", "RowFacts", "bench_rows", "row_facts"]

_MEDIAN_ANSWER_TOKENS = 128
_SPREAD = 0.6
"""Standard deviation of the logarithm of an answer's length: quartiles are 85 and 192 tokens."""


@dataclass(frozen=True, kw_only=True)
class BenchRows:
    """The rows of one step."""

    retain: tuple[Rendered, ...]
    harmful: tuple[Rendered, ...]


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What the rows of a benchmark are like."""

    source: str
    rows_per_kind: int
    tokens_per_step: float
    """Mean, of both kinds together."""
    median_row_tokens: int
    longest_row_tokens: int
    density: float
    """Tokens over places, where the rows of each kind are padded to the step's longest."""


def bench_rows(
    recipe: Recipe, model_dir: Path, *, rows_per_kind: int, num_steps: int, seed: int = 0
) -> list[BenchRows]:
    """Rows of `num_steps` steps, drawn in random order, as the published loop draws them.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(model_dir, recipe.chat_template)
    rng = random.Random(seed)  # noqa: S311  no secret
    pairs = twin_pairs()

    def row(text: str) -> Rendered:
        prompt = render_prompt(tokenizer, [Message("user", text)])
        length = rng.lognormvariate(math.log(_MEDIAN_ANSWER_TOKENS), _SPREAD)
        answer = [rng.randrange(len(tokenizer)) for _ in range(max(1, round(length)))]
        return Rendered(
            ids=(*prompt, *answer)[: recipe.max_length],
            num_prompt_tokens=min(len(prompt), recipe.max_length - 1),
        )

    steps = []
    for _ in range(num_steps):
        chosen = [rng.choice(pairs) for _ in range(rows_per_kind)]
        steps.append(
            BenchRows(
                retain=tuple(row(pair.benign) for pair in chosen),
                harmful=tuple(row(pair.harmful) for pair in chosen),
            )
        )
    return steps


def row_facts(steps: Sequence[BenchRows]) -> RowFacts:
    """What these rows are like."""
    kinds = [kind for step in steps for kind in (step.retain, step.harmful)]
    lengths = sorted(len(row.ids) for kind in kinds for row in kind)
    places = sum(len(kind) * max(len(row.ids) for row in kind) for kind in kinds)
    return RowFacts(
        source=(
            "prompts that ship with this package; answers of random tokens, log-normal length, "
            f"median {_MEDIAN_ANSWER_TOKENS}, log spread {_SPREAD}"
        ),
        rows_per_kind=len(kinds[0]),
        tokens_per_step=sum(lengths) / len(steps),
        median_row_tokens=lengths[len(lengths) // 2],
        longest_row_tokens=lengths[-1],
        density=sum(lengths) / places,
    )
