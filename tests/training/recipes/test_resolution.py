from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers_training.recipes.resolution import (
    Override,
    auto_learning_rate,
    parse_override,
    resolve_recipe,
)


def never(name: str) -> Path:
    raise AssertionError(f"the model {name} was asked")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def origins(path: Path | str, *flags: str, find_model: object = never) -> dict[str, str]:
    resolved = resolve_recipe(
        path,
        [parse_override(flag) for flag in flags],
        find_model=find_model,  # type: ignore[arg-type]
    )
    return {setting.field: setting.origin for setting in resolved.settings}


def test_flags_go_over_the_file_and_both_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nsteps = 7\n[lora]\nrank = 4\nalpha = 8\n')
    overrides = [
        parse_override("lora.rank=2"),
        parse_override("probe.l2_C = 0.5"),
        Override(field="model", value="other", flag="--model"),
    ]
    resolved = resolve_recipe(path, overrides, find_model=never)
    recipe = resolved.recipe
    assert (recipe.model, recipe.steps, recipe.lora.rank, recipe.lora.alpha) == ("other", 7, 2, 8)
    assert recipe.probe.l2_C == 0.5
    # In the order of the fields of a Recipe; defaults are not listed.
    assert [(s.field, s.value, s.origin) for s in resolved.settings] == [
        ("model", "other", "--model"),
        ("steps", 7, "recipe"),
        ("lora.rank", 2, "--set"),
        ("lora.alpha", 8, "recipe"),
        ("probe.l2_C", 0.5, "--set"),
    ]
    lines = resolved.describe().splitlines()
    assert str(path) in lines[0]
    assert lines[3].split() == ["lora.rank", "2", "--set"]


def test_a_resolved_recipe_is_the_one_that_its_fields_make(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nsteps = 7\n')
    flagged = resolve_recipe(path, [parse_override("steps=8")], find_model=never).recipe
    written = resolve_recipe(write(tmp_path, 'model = "m"\nsteps = 8\n'), find_model=never).recipe
    assert flagged == written
    assert flagged.training_digest() == written.training_digest()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps=3", 3),
        ("learning_rate = 1e-4", 1e-4),
        ("layers=[3, 5]", [3, 5]),
        ('schedule="constant"', "constant"),
        ("compile=true", True),
        ("lora={rank = 2}", {"rank": 2}),
        ('model="a=b"', "a=b"),
    ],
)
def test_values_are_toml(flag: str, value: object) -> None:
    assert parse_override(flag).value == value


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("steps", "expected FIELD=VALUE"),
        ("=3", "expected FIELD=VALUE"),
        ("lora..rank=3", "expected FIELD=VALUE"),
        ("a b=3", "expected FIELD=VALUE"),
        ("schedule=cosine", "--set schedule=cosine, whose value is not TOML"),
        ("steps=", "--set steps=, whose value is not TOML"),
        ("steps=" + "[" * 2000, "whose value is not TOML"),
        ("steps=3\nseed = 4", "--set steps with more than one value"),
    ],
)
def test_flags_that_cannot_be_read_are_named(flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_override(flag)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["steps=0"], "steps = 0 (from --set): Input should be greater than or equal to 1"),
        (["step=3"], "step (from --set) is not a field of a recipe; did you mean steps?"),
        (["lora.rnk=3"], "lora.rnk (from --set) is not a field of a recipe; did you mean"),
        (["qqqq=3"], "qqqq (from --set) is not a field of a recipe; remove it"),
        (["steps.x=3"], "got field steps.x, but steps is no table"),
        (["lora=3"], "lora = 3 (from --set): Input should be a valid dictionary"),
        (["steps=3", "steps=4"], "got steps from --set and again from --set"),
        (["lora.rank=3", "lora={rank = 4}"], "got lora.rank from --set and again"),
        (["micro_batch_size=64"], "micro_batch_size is 64; expected at most batch_size, 8"),
        (['chat_template="best"'], "chat_template = 'best' (from --set)"),
    ],
)
def test_flags_that_do_not_fit_are_named(tmp_path: Path, flags: list[str], said: str) -> None:
    path = write(tmp_path, 'model = "m"\nsteps = 2\n')
    with pytest.raises(ConfigError) as error:
        origins(path, *flags)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "m"\nsteps = 0\n', "steps = 0: Input should be greater than or equal to 1"),
        ('model = "m"\nstep = 3\n', "step is not a field of a recipe; did you mean steps?"),
        ("steps = 3\n", "model is missing; expected a value; pass --model"),
        ('model = "m"\n[lora]\nb_init_std = 0\n', "lora.b_init_std = 0: Input should be greater"),
        ('model = "m"\nlearning_rate = nan\n', "learning_rate = nan: Input should be a finite"),
        ('model = "m"\nlayers = [3, 3]\n', "each once; leave it out to use target_depth"),
        ("model = 3\n", "model = 3: Input should be a valid string"),
    ],
)
def test_bad_recipe_file_says_what_to_change(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        resolve_recipe(path, find_model=never)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_model_of_two_flags_is_refused(tmp_path: Path) -> None:
    flags = [parse_override('model="a"'), Override(field="model", value="b", flag="--model")]
    with pytest.raises(ConfigError, match="got model from --set and again from --model"):
        resolve_recipe(write(tmp_path, 'model = "m"\n'), flags, find_model=never)


def test_learning_rate_follows_the_number_of_parameters() -> None:
    # Measured on SmolLM2-135M; published for Llama-3-8B (arXiv 2406.04313).
    assert auto_learning_rate(134_515_008) == 1e-3
    assert auto_learning_rate(8_000_000_000) == 1e-4
    # Never above the larger of the two, and on along the line below the smaller.
    assert auto_learning_rate(40_000) == 1e-3
    # 1e-3 * (135e6 / 1e9) ** 0.564 and the same for 70e9, to two digits.
    assert auto_learning_rate(1_000_000_000) == 3.2e-4
    assert auto_learning_rate(70_000_000_000) == 2.9e-5


def test_auto_is_asked_of_the_model(tiny_llama: Path) -> None:
    model = Override(field="model", value=str(tiny_llama), flag="--model")
    resolved = resolve_recipe("auto", [model])
    assert (resolved.recipe.learning_rate, resolved.recipe.chat_template) == (1e-3, "model")
    by_field = {s.field: s.origin for s in resolved.settings}
    # 2 * 80 * 32 embeddings and head, 4 blocks of 9,280, a norm of 32: 42,272.
    assert by_field["learning_rate"] == "model (0.0M parameters)"
    assert by_field["chat_template"] == "model (its tokenizer has a template)"
    assert by_field["model"] == "--model"
    assert by_field["lora.first_depth"] == "recipe"


@pytest.mark.parametrize(
    ("dtype", "precision", "origin"),
    [("auto", "bf16", "machine"), ("float32", "fp32", "machine (slow at bfloat16)")],
)
def test_the_precision_is_asked_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, dtype: str, precision: str, origin: str
) -> None:
    monkeypatch.setattr("circuit_breakers_training.recipes.resolution.quick_dtype", lambda: dtype)
    name = "smollm2-135m-instruct"
    assert resolve_recipe(name, find_model=never).recipe.precision == precision
    assert origins(name, find_model=never)["precision"] == origin
    told = resolve_recipe(name, [parse_override('precision="bf16"')], find_model=never)
    assert told.recipe.precision == "bf16"


def test_auto_takes_the_plain_template_where_there_is_none(tiny_gpt2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "{tmp_path}"\nchat_template = "auto"\n')
    resolved = resolve_recipe(path, find_model=Path)
    assert resolved.recipe.chat_template == "plain"
    assert origins(path, find_model=Path)["chat_template"] == (
        "model (its tokenizer has no template)"
    )


def test_a_flag_may_ask_the_model_and_may_answer_for_it(tiny_llama: Path) -> None:
    model = Override(field="model", value=str(tiny_llama), flag="--model")
    asked = resolve_recipe("smollm2-135m-instruct", [model, parse_override('learning_rate="auto"')])
    assert asked.recipe.learning_rate == 1e-3
    answers = [parse_override("learning_rate=2e-3"), parse_override('chat_template="model"')]
    assert resolve_recipe("auto", [model, *answers], find_model=never).recipe.learning_rate == 2e-3


def test_auto_without_a_model_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="model is missing; expected a value; pass --model"):
        resolve_recipe("auto", find_model=never)
    unknown = Override(field="model", value="no-such-model", flag="--model")
    with pytest.raises(ModelError, match="no-such-model"):
        resolve_recipe("auto", [unknown])
