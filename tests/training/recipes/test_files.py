from __future__ import annotations

from pathlib import Path

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.recipes.files import (
    AUTO_RECIPE,
    DEFAULT_RECIPE,
    read_recipe_file,
    recipe_for_model,
    recipe_names,
)


def packaged(name: str) -> Recipe:
    """A recipe with what only the model decides filled in."""
    fields = {"model": "m", **read_recipe_file(name).fields}
    known = {"learning_rate": 1e-4, "chat_template": "model", "precision": "bf16"}
    return Recipe.model_validate(
        fields | {field: known[field] for field in known if fields.get(field) == "auto"}
    )


def test_all_recipes_are_listed() -> None:
    assert recipe_names() == (
        "auto",
        "gpt2",
        "llama3-8b-instruct",
        "llama3.1-8b-instruct",
        "mistral-7b-instruct-v0.2",
        "qwen3-8b",
        "smollm2-135m-instruct",
    )
    assert {DEFAULT_RECIPE, AUTO_RECIPE} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    file = read_recipe_file(name)
    assert packaged(name).notes
    assert len(file.notes) > 80
    assert "\n" not in file.notes
    assert (file.model is None) == (name == AUTO_RECIPE)


# Blocks of the models, from the config.json of each on the hub.
@pytest.mark.parametrize(
    ("name", "num_layers", "max_positions", "targets"),
    [
        ("gpt2", 12, 1024, (3, 7)),
        ("llama3-8b-instruct", 32, 8192, (9, 19)),
        ("llama3.1-8b-instruct", 32, 131072, (20,)),
        ("mistral-7b-instruct-v0.2", 32, 32768, (9, 19)),
        ("qwen3-8b", 36, 40960, (23,)),
        ("smollm2-135m-instruct", 30, 8192, (19,)),
    ],
)
def test_every_recipe_fits_its_model(
    name: str, num_layers: int, max_positions: int, targets: tuple[int, ...]
) -> None:
    recipe = packaged(name)
    recipe.check_runs(num_layers=num_layers, max_positions=max_positions, device="cpu")
    assert recipe.target_layers(num_layers) == targets


@pytest.mark.parametrize(
    ("name", "alpha", "blank_prompt_share", "refusals"),
    [("llama3-8b-instruct", 10.0, 0.5, True), ("mistral-7b-instruct-v0.2", 5.0, 0.0, False)],
)
def test_published_values(
    name: str, alpha: float, blank_prompt_share: float, refusals: bool
) -> None:
    """arXiv 2406.04313, appendix on training, and its reference implementation's defaults.

    hidden_states[10] and [20] there are the outputs of blocks 9 and 19.
    """
    recipe = packaged(name)
    assert recipe.layers == (9, 19)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 16, 0.05)
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.adapted_layers(32) == tuple(range(20))
    objective = recipe.objective
    assert (objective.alpha, objective.retain, objective.retain_weight) == (alpha, "absolute", 1.0)
    assert (objective.retain_layers, objective.reroute_tokens) == ("all", "all")
    assert objective.retain_refusals is refusals
    assert (recipe.steps, recipe.batch_size, recipe.max_length) == (150, 16, 1024)
    assert (recipe.learning_rate, recipe.schedule) == (1e-4, "constant")
    assert recipe.data.blank_prompt_share == blank_prompt_share


def test_gpt2_targets_sit_at_the_published_depths() -> None:
    # 10 of 32 blocks are 3.75 of 12, 20 of 32 are 7.5 of 12; a block's index is one less.
    assert packaged("gpt2").layers == (round(3.75) - 1, round(7.5) - 1)


def test_a_model_has_the_recipe_that_names_it() -> None:
    assert recipe_for_model(None) == "smollm2-135m-instruct"
    assert recipe_for_model("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert recipe_for_model("Qwen/Qwen3-8B") == "qwen3-8b"
    assert recipe_for_model("some/other-model") == "auto"


def test_a_file_of_the_user_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('model = "m"\nnotes = """\nwhy\nand how"""\n[lora]\nrank = 4\n')
    file = read_recipe_file(path)
    assert (file.name, file.model, file.notes) == (str(path), "m", "why and how")
    assert file.fields["lora"] == {"rank": 4}


def test_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*smollm2-135m-instruct"):
        read_recipe_file("smollm3")
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "content",
    [b"model = \n", b'model = "\xff"\n', b"steps = " + b"[" * 2000, b"steps = " + b"9" * 5000],
)
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        read_recipe_file(path)
