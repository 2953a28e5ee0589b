from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.config import (
    LoraRecipe,
    Recipe,
    layer_at_depth,
    load_recipe,
    recipe_names,
)


def test_every_packaged_recipe_loads() -> None:
    assert "smollm2-135m-instruct" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).model


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
    assert Recipe(model="m", steps=151).training_digest() != recipe.training_digest()


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(model="m").steps = 3  # type: ignore[misc]


def test_recipe_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('model = "m"\nsteps = 7\n[lora]\nrank = 4\n', encoding="utf-8")
    recipe = load_recipe(path)
    assert (recipe.steps, recipe.lora.rank) == (7, 4)
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "m"\nsteps = 0\n', "steps = 0: Input should be greater than or equal to 1"),
        ('model = "m"\nstep = 3\n', "step is not a field of a recipe; remove it"),
        ("steps = 3\n", "model is missing"),
        ('model = "m"\n[lora]\nb_init_std = 0\n', "lora.b_init_std = 0: Input should be greater"),
        ('model = "m"\nlearning_rate = nan\n', "learning_rate = nan: Input should be a finite"),
        ('model = "m"\nlayers = [3, 3]\n', "each once; leave it out to use target_depth"),
        ('model = "m"\n[probe]\nconcatenations = ["some"]\n', "probe.concatenations.0 = 'some'"),
        ('model = "m"\n[probe]\nfpr_ladder = [0.0]\n', "probe.fpr_ladder.0 = 0.0"),
        ("model = \n", "is not TOML"),
    ],
)
def test_bad_recipe_file_says_what_to_change(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*smollm2-135m-instruct"):
        load_recipe("smollm3")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
