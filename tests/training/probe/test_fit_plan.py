"""What is fitted on, against what is then really collected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.probe.fit_plan import plan_fit, reduced_text, token_bytes
from circuit_breakers_training.probe.fit_tokens import collect_fit_tokens
from circuit_breakers_training.recipes.config import ProbeRecipe
from circuit_breakers_training.render import Rendered

from .fixed_reader import FixedReader, opposite_conversations

NUM_LAYERS, WIDTH = 8, 6
RECIPE = ProbeRecipe(
    # Blocks 3 and 5 of 8, as in fixed_reader.
    candidate_depths=(0.5, 0.75),
    aggregations=(Aggregation(kind="max"), Aggregation(kind="rolling_mean", window=4)),
    tokens_per_conversation=12,
)
# Blocks 3 and 5 side by side and the one that is copied last, float32.
MEMORY_OF_TOKEN = 3 * WIDTH * 4


def _conversations(num_each: int) -> tuple[list[Conversation], list[Rendered], list[Any]]:
    rows, harmful, hidden = opposite_conversations(num_each)
    conversations = [
        Conversation(
            messages=(Message("user", "q"), Message("assistant", str(i))),
            label="harmful" if label else "benign",
            source="s",
            group=str(i),
        )
        for i, label in enumerate(harmful)
    ]
    return conversations, rows, hidden


def _plan(conversations: Any, rows: Any, recipe: ProbeRecipe = RECIPE) -> Any:
    return plan_fit(conversations, rows, recipe, num_layers=NUM_LAYERS, hidden_size=WIDTH)


def _with_tokens(num_tokens: int) -> ProbeRecipe:
    """Memory for so many tokens and a half."""
    gib = (num_tokens + 0.5) * MEMORY_OF_TOKEN / 2**30
    return RECIPE.model_copy(update={"max_fit_gib": gib})


def test_what_one_token_takes() -> None:
    of_one = token_bytes(RECIPE, num_layers=NUM_LAYERS, hidden_size=WIDTH)
    # On disk 2 blocks under 2 aggregations.
    assert of_one == (MEMORY_OF_TOKEN, 4 * WIDTH * 4)
    alone = RECIPE.model_copy(update={"concatenations": ()})
    of_one = token_bytes(alone, num_layers=NUM_LAYERS, hidden_size=WIDTH)
    assert of_one == (WIDTH * 4, 4 * WIDTH * 4)


@pytest.mark.parametrize("limit", [10_000, 130, 30])
def test_plan_says_what_is_collected(tmp_path: Path, limit: int) -> None:
    conversations, rows, hidden = _conversations(10)
    recipe = _with_tokens(limit)
    plan = _plan(conversations, rows, recipe)
    tokens = collect_fit_tokens(
        FixedReader(hidden, (3, 5)),
        rows,
        [c.label == "harmful" for c in conversations],
        directory=tmp_path,
        aggregations=recipe.aggregations,
        tokens_per_conversation=plan.tokens_per_conversation,
        seed=4,
    )
    assert plan.num_tokens == len(tokens.harmful_N) <= limit
    disk = token_bytes(recipe, num_layers=NUM_LAYERS, hidden_size=WIDTH).disk
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == plan.num_tokens * disk


def test_every_conversation_gives_as_many_fewer() -> None:
    conversations, rows, _ = _conversations(10)
    whole = _plan(conversations, rows)
    assert (whole.tokens_per_conversation, whole.is_reduced) == (12, False)
    assert reduced_text(RECIPE, whole) == ""
    # Exactly enough changes nothing, one token less does.
    enough = _plan(conversations, rows, _with_tokens(whole.num_tokens))
    assert enough == whole
    recipe = _with_tokens(whole.num_tokens - 1)
    fewer = _plan(conversations, rows, recipe)
    assert (fewer.tokens_per_conversation, fewer.is_reduced) == (11, True)
    assert fewer.kept == whole.kept
    assert "11 tokens of each of 20 conversations, not 12" in reduced_text(recipe, fewer)
    # 3 tokens open all of them after the skipped one, and 20 conversations have 4 more at least.
    assert _plan(conversations, rows, _with_tokens(3 + 20)).tokens_per_conversation == 1


def test_no_room_for_one_token_of_each_is_refused() -> None:
    conversations, rows, _ = _conversations(10)
    with pytest.raises(ConfigError, match=r"22 tokens of 72 bytes, for 20 training conversations"):
        _plan(conversations, rows, _with_tokens(22))


def test_repeats_are_fitted_once() -> None:
    conversations, rows, _ = _conversations(3)
    repeated = _plan(conversations * 50, rows * 50)
    once = _plan(conversations, rows)
    assert repeated.kept == once.kept == tuple(range(6))
    assert (repeated.num_repeats, once.num_repeats) == (49 * 6, 0)
    assert repeated.num_tokens == once.num_tokens


def test_equal_texts_of_two_labels_are_both_fitted_and_refused_ones_are_not() -> None:
    conversations, rows, _ = _conversations(2)
    other = replace(conversations[0], label="harmful")
    refused = replace(conversations[0], kind="refusal")
    plan = _plan([*conversations, other, refused], [*rows, rows[0], rows[0]])
    assert plan.kept == (0, 1, 2, 3, 4)
    assert plan.num_repeats == 0


def test_all_tokens_are_wanted_where_no_number_is() -> None:
    conversations, rows, _ = _conversations(4)
    plan = _plan(conversations, rows, RECIPE.model_copy(update={"tokens_per_conversation": None}))
    # Without the four that open all of them, of which three are scored.
    assert plan.num_tokens == sum(len(row.ids) - 4 for row in rows) + 3
    assert not plan.is_reduced


def test_data_of_the_paper_stay_within_the_memory_of_an_8b_model() -> None:
    conversations = _conversations(1)[0] * 7300
    rows = [Rendered(ids=(i, *range(60)), num_prompt_tokens=6) for i in range(14_600)]
    plan = plan_fit(conversations, rows, ProbeRecipe(), num_layers=32, hidden_size=4096)
    # 16 GiB are 149,796 tokens of 7 * 4096 * 4 bytes; 11 of each would be 160,600.
    assert (plan.tokens_per_conversation, plan.num_tokens) == (10, 146_000)


def test_defaults_leave_the_built_in_model_as_it_was() -> None:
    # 5,000 conversations, more than are built for it, of 32 tokens.
    memory = token_bytes(ProbeRecipe(), num_layers=30, hidden_size=576).memory
    assert 5000 * 32 * memory < ProbeRecipe().max_fit_gib * 2**30
