"""What a run keeps of an earlier one, and what it does anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuit_breakers.models import resolve_model
from circuit_breakers_training import stages
from circuit_breakers_training.data.dataset import (
    SCHEMA_VERSION,
    BuiltDataset,
    load_dataset,
    read_summary,
    write_dataset,
)
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import load_tokenizer
from circuit_breakers_training.stages import Run, build_data, train
from circuit_breakers_training.work_dir import WorkDir

from .conftest import make_conversations

pytestmark = pytest.mark.usefixtures("one_thread")


def new_run(recipe: Recipe, work: Path) -> Run:
    model = resolve_model(recipe.model)
    return Run(
        recipe=recipe,
        model=model,
        work=WorkDir(work, resume=True),
        console=None,
        tokenizer=load_tokenizer(model.path, recipe.chat_template),
        processes=Processes(recipe),
    )


def test_other_weights_at_the_same_path_get_an_adapter_of_their_own(
    recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(recipe.model, model_dir)
    recipe = recipe.model_copy(update={"model": str(model_dir), "steps": 1})
    dataset = load_dataset(data_dir)
    first = new_run(recipe, tmp_path / "work")
    adapter = train(first, dataset)
    again = new_run(recipe, tmp_path / "work")
    assert train(again, dataset) == adapter
    assert again.inputs(adapter, dataset) == first.inputs(adapter, dataset)

    weights = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: -weights[name]}, model_dir / "model.safetensors", {"format": "pt"})
    other = new_run(recipe, tmp_path / "work")
    trained = train(other, dataset)
    before, after = (
        load_file(result.adapter_dir / "adapter_model.safetensors") for result in (adapter, trained)
    )
    assert any(not torch.equal(before[key], after[key]) for key in before)
    # What the stages after this one depend on.
    assert other.inputs(trained, dataset) != first.inputs(adapter, dataset)


def test_a_dataset_that_its_build_makes_anew_is_taken(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = "prompts of this release"

    def build(out_dir: Path, *, overwrite: bool, **_settings: Any) -> BuiltDataset:
        """Finds its own dataset and makes others anew, as the real one does in an hour."""
        assert overwrite
        cached = out_dir.exists() and read_summary(out_dir)["inputs_sha256"] == inputs
        if not cached:
            rows = {
                name: make_conversations("benign", 1, len(inputs) + i)
                for i, name in enumerate(SPLITS)
            }
            write_dataset(
                out_dir, rows, {"schema_version": SCHEMA_VERSION, "inputs_sha256": inputs}
            )
        seconds = 0.1 if cached else 3600.0 + len(inputs)
        return BuiltDataset(
            path=out_dir, summary=read_summary(out_dir), seconds=seconds, cached=cached
        )

    monkeypatch.setattr(stages, "build_dataset", build)
    first = new_run(recipe, tmp_path / "work")
    dataset = build_data(first)
    again = new_run(recipe, tmp_path / "work")
    assert build_data(again) == dataset
    assert again.work.seconds == first.work.seconds == {"data": 3600 + len(inputs)}

    inputs = "prompts of another release"
    other = new_run(recipe, tmp_path / "work")
    assert build_data(other).digests != dataset.digests
    assert other.work.seconds == {"data": 3600 + len(inputs)}
