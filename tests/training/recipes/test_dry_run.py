from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.adapter.retain_set import retain_set
from circuit_breakers_training.data.dataset import SCHEMA_VERSION, write_dataset
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.recipes.config import (
    DataRecipe,
    LoraRecipe,
    ObjectiveRecipe,
    ProbeRecipe,
    Recipe,
)
from circuit_breakers_training.recipes.dry_run import DryRun, dry_run

from ..conftest import make_conversations

RECIPE = Recipe(
    model="tiny",
    steps=9,
    batch_size=4,
    max_length=100,
    lora=LoraRecipe(rank=4, first_depth=0.25),
    probe=ProbeRecipe(candidate_depths=(0.5, 0.75)),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dataset"
    splits = {
        name: make_conversations("benign", 6, seed) + make_conversations("harmful", 5, seed + 1)
        for seed, name in enumerate(SPLITS, start=10)
    }
    write_dataset(path, splits, {"schema_version": SCHEMA_VERSION})
    return path


def plan(model_dir: Path, recipe: Recipe = RECIPE, data_dir: Path | None = None) -> DryRun:
    return dry_run(recipe, model_dir, data_dir=data_dir, device="cpu")


def test_layers_and_steps_are_those_of_the_training(tiny_llama: Path) -> None:
    planned = plan(tiny_llama)
    # Of 4 blocks: 2/3 is block 2, first_depth 1/4 leaves block 0 out, 1/2 and 3/4 are 1 and 2.
    assert planned.target_layers == (2,)
    assert planned.adapted_layers == (1, 2)
    assert planned.candidate_layers == (1, 2)
    assert planned.refusal is None
    # 4 benign and 4 harmful conversations of 100 tokens.
    assert planned.max_tokens_per_step == 800
    text = planned.describe()
    for said in (
        "tiny: LlamaForCausalLM, 4 blocks, width 32, 42,272 parameters",
        "down_proj, gate_proj, k_proj",
        "9 of 4 benign and 4 harmful conversations, at most 800 tokens",
        "memory, estimated",
        "none given: would be built for the model, seed 0",
    ):
        assert said in text


def test_a_config_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert plan(tmp_path).describe() == plan(tiny_llama).describe()


def test_given_data_are_counted_and_measured(tiny_llama: Path, data_dir: Path) -> None:
    recipe = RECIPE.model_copy(update={"data": DataRecipe(blank_prompt_share=1.0)})
    planned = plan(tiny_llama, recipe, data_dir)
    assert planned.data is not None
    # 6 benign and 5 harmful rows, of sources even, odd, even, ...
    assert planned.data.counts["train"] == {
        "benign: even": 3,
        "benign: odd": 3,
        "harmful: even": 3,
        "harmful: odd": 2,
    }
    assert set(planned.data.counts) == set(SPLITS)
    assert planned.data.num_blanked == 5
    # At most: header, please, 4 words, end, header, 12 words.
    assert planned.data.max_tokens <= 20
    assert planned.max_tokens_per_step == 8 * planned.data.max_tokens
    assert planned.shape.memory.activations < plan(tiny_llama).shape.memory.activations
    assert "data, train" in planned.describe()
    assert (
        "0 refusals not retained, 5 with a blank prompt, 0 cut at max_length, 0 left out"
        in planned.describe()
    )


def test_refusals_that_are_not_retained_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    splits = {name: make_conversations("benign", 4, i) for i, name in enumerate(SPLITS)}
    refused = replace(splits["train"][0], kind="refusal", source="refusal")
    splits["train"][0] = refused
    splits["train"] += make_conversations("harmful", 3, 9)
    write_dataset(tmp_path / "data", splits, {"schema_version": SCHEMA_VERSION})
    for retained, num_left_out in ((True, 0), (False, 1)):
        objective = ObjectiveRecipe(retain_refusals=retained)
        recipe = RECIPE.model_copy(update={"objective": objective})
        planned = plan(tiny_llama, recipe, tmp_path / "data")
        assert planned.data is not None
        assert planned.data.num_refusals_left_out == num_left_out
        assert f"{num_left_out} refusals not retained" in planned.describe()
    rows = [*splits["train"]]
    assert retain_set(rows, recipe) == [c for c in rows if c.label == "benign" and c != refused]
    assert refused in retain_set(rows, RECIPE)
    # BeaverTails' harmless answers to harmful requests have the kind, too, and are no refusals.
    answer = replace(refused, source="beavertails")
    assert retain_set([answer], recipe) == [answer]


def test_conversations_that_do_not_fit_are_counted(tiny_llama: Path, data_dir: Path) -> None:
    planned = plan(tiny_llama, RECIPE.model_copy(update={"max_length": 9}), data_dir)
    assert planned.data is not None
    # No prompt is shorter than 6 tokens, and no response shorter than 4.
    assert planned.data.num_truncated + planned.data.num_dropped == 11


def test_memory_and_disk_of_the_fit_are_estimated(tiny_llama: Path, data_dir: Path) -> None:
    # Of one token: blocks 1 and 2 side by side and one of them again, and on the disk both under
    # three aggregations; float32 of width 32. 32 tokens of 1,000 conversations are 11.7 MiB.
    text = plan(tiny_llama).describe()
    assert "11.7 MiB of memory and 23.4 MiB of disk for each 1,000 training conv" in text
    assert "at most 16.0 GiB and 32.0 GiB" in text
    planned = plan(tiny_llama, data_dir=data_dir)
    assert planned.fit is not None
    assert len(planned.fit.kept) == 11
    assert f"{planned.fit.num_tokens} tokens of 11 conversations" in planned.describe()
    small = RECIPE.probe.model_copy(update={"max_fit_gib": 25 * 3 * 32 * 4 / 2**30})
    planned = plan(tiny_llama, RECIPE.model_copy(update={"probe": small}), data_dir)
    assert planned.fit is not None
    assert planned.fit.num_tokens <= 25
    assert "tokens of each of 11 conversations, not 32" in planned.describe().splitlines()[-1]
    none = small.model_copy(update={"max_fit_gib": 1e-9})
    planned = plan(tiny_llama, RECIPE.model_copy(update={"probe": none}), data_dir)
    assert "got probe.max_fit_gib 1e-09" in str(planned.refusal)


def test_data_that_cannot_be_read_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a built dataset"):
        plan(tiny_llama, data_dir=tmp_path)


def test_what_training_would_refuse_is_said(tiny_llama: Path) -> None:
    planned = plan(tiny_llama, RECIPE.model_copy(update={"quantization": "nf4"}))
    assert planned.refusal is not None
    last = planned.describe().splitlines()[-1]
    assert last.startswith("would be refused: quantization is 'nf4' on device 'cpu'")
    too_long = plan(tiny_llama, RECIPE.model_copy(update={"max_length": 129}))
    assert "max_length is 129, expected at most 128" in str(too_long.refusal)
