from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.recipes.config import (
    DataRecipe,
    LoraRecipe,
    ProbeRecipe,
    Recipe,
    layer_at_depth,
)


def test_two_thirds_of_thirty_blocks_is_block_19() -> None:
    # 20 of 30 blocks have run at the output of the block with index 19.
    assert layer_at_depth(2 / 3, 30) == 19
    assert Recipe(model="m").target_layers(30) == (19,)


def test_last_block_is_never_a_target() -> None:
    assert layer_at_depth(0.99, 12) == 10
    with pytest.raises(ConfigError, match="12 blocks allows 0 to 10"):
        Recipe(model="m", layers=(11,)).target_layers(12)


def test_layers_override_depth_and_come_back_ascending() -> None:
    assert Recipe(model="m", layers=(20, 10)).target_layers(32) == (10, 20)


def test_adapter_covers_blocks_from_first_depth_to_deepest_target() -> None:
    assert Recipe(model="m").adapted_layers(30) == tuple(range(20))
    half = Recipe(model="m", lora=LoraRecipe(first_depth=1 / 3))
    assert half.adapted_layers(30) == tuple(range(10, 20))
    above = Recipe(model="m", lora=LoraRecipe(first_depth=0.9))
    with pytest.raises(ConfigError, match="block 27, above the deepest target, block 19"):
        above.adapted_layers(30)


def test_digest_follows_training_fields_alone() -> None:
    recipe = Recipe(model="m")
    same = Recipe.model_validate({"model": "m", "checkpoint_every": 3, "probe": {"l2_C": 1.0}})
    assert same.training_digest() == recipe.training_digest()
    noted = Recipe(model="m", notes="why", data=DataRecipe(max_new_tokens=3))
    assert noted.training_digest() == recipe.training_digest()
    assert Recipe(model="m", steps=151).training_digest() != recipe.training_digest()
    blanked = Recipe(model="m", data=DataRecipe(blank_prompt_share=0.5))
    assert blanked.training_digest() != recipe.training_digest()


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(model="m").steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": (3, 3)}, "each once; leave it out to use target_depth"),
        ({"batch_size": 4, "micro_batch_size": 5}, "micro_batch_size is 5; expected at most"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"lora": {"b_init_std": 0}}, "greater than 0"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate({"model": "m", **fields})


def test_micro_batches_up_to_the_batch_are_allowed() -> None:
    assert Recipe(model="m", batch_size=4, micro_batch_size=4).micro_batch_size == 4


def test_candidate_layers_are_ascending_and_each_once() -> None:
    probe = ProbeRecipe(candidate_depths=(0.75, 0.5, 0.52, 0.99))
    # round(0.75 * 12) - 1, round(0.5 * 12) - 1 = round(0.52 * 12) - 1, and never the last block.
    assert probe.candidate_layers(12) == (5, 8, 10)


def test_a_recipe_that_fits_runs() -> None:
    Recipe(model="m").check_runs(num_layers=30, max_positions=2048, device="cpu")
    Recipe(model="m", quantization="nf4").check_runs(
        num_layers=30, max_positions=2048, device="cuda"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": "nf4"}, "quantization is 'nf4' on device 'cpu', expected 'cuda'"),
        ({"max_length": 257}, "max_length is 257, expected at most 256"),
        ({"layers": (11,)}, "12 blocks allows 0 to 10"),
    ],
)
def test_a_recipe_that_cannot_run_says_which_field_to_change(
    fields: dict[str, Any], said: str
) -> None:
    recipe = Recipe.model_validate({"model": "m", "max_length": 256, **fields})
    with pytest.raises(ConfigError, match=said):
        recipe.check_runs(num_layers=12, max_positions=256, device="cpu")
