"""What the line refuses before it has trained anything, and how a breaker is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from circuit_breakers.errors import CalibrationError, ConfigError, ModelError
from circuit_breakers_training import pipeline
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.pipeline import breaker_name, run_training
from circuit_breakers_training.recipes.config import Recipe

from .two_processes import launch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": "nf4"}, "quantization is 'nf4' on device 'cpu', expected 'cuda'"),
        ({"max_length": 129}, "max_length is 129, expected at most 128"),
        ({"layers": (3,)}, "4 blocks allows 0 to 2"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_at_the_start(
    recipe: Recipe,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    said: str,
) -> None:
    # The same on a machine with a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        run_training(recipe.model_copy(update=fields), tmp_path / "breaker", data_dir=data_dir)
    assert not (tmp_path / "breaker.work").exists()


def test_quantised_weights_are_refused_at_the_start(
    recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "quantised"
    shutil.copytree(recipe.model, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    quantised = recipe.model_copy(update={"model": str(model)})
    with pytest.raises(ModelError, match="use the unquantised model"):
        run_training(quantised, tmp_path / "breaker", data_dir=data_dir)
    assert not (tmp_path / "breaker.work").exists()


def test_several_processes_need_a_dataset(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"data build.* first and pass it with --data"):
        launch(
            *("-m", "circuit_breakers.cli", "train", "--model", recipe.model),
            *("--out", str(tmp_path / "breaker")),
        )


def test_too_few_benign_conversations_are_refused_before_training(
    recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    probe = recipe.probe.model_copy(update={"target_fpr": 0.01})
    with pytest.raises(CalibrationError, match="got 70 benign"):
        run_training(
            recipe.model_copy(update={"probe": probe}), tmp_path / "breaker", data_dir=data_dir
        )
    assert not list((tmp_path / "breaker.work").glob("adapter*"))


def test_a_fit_without_memory_is_refused_before_training_and_what_is_cut_is_said(
    recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    probe = recipe.probe.model_copy(update={"max_fit_gib": 1e-9})
    # Responses have 4 to 12 tokens, after prompts of 6 to 9.
    short = recipe.model_copy(update={"probe": probe, "max_length": 12})
    with (tmp_path / "console").open("w") as file:
        console = Console(file=file, width=80)
        with pytest.raises(ConfigError, match=r"got probe.max_fit_gib 1e-09, which is 0 tokens"):
            run_training(short, tmp_path / "breaker", data_dir=data_dir, console=console)
    (line,) = (tmp_path / "console").read_text().splitlines()
    said = re.fullmatch(
        r"conversations beyond max_length 12: "
        r"train (\d+) cut and 0 left out of 140; selection \d+ cut and 0 left out of 50; "
        r"calibration \d+ cut and 0 left out of 75; test \d+ cut and 0 left out of 50",
        line,
    )
    assert said is not None, line
    assert 0 < int(said[1]) < 140
    assert not list((tmp_path / "breaker.work").glob("adapter*"))


def test_never_replaces_what_it_did_not_make(
    recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "breaker").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        run_training(recipe, tmp_path / "breaker", data_dir=data_dir)
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="other files"):
        run_training(recipe, tmp_path / "other", data_dir=data_dir, resume=False)
    assert (tmp_path / "other.work" / "thesis.tex").read_text() == "precious"


def test_a_second_run_at_the_same_time_is_refused(
    recipe: Recipe, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pipeline.load_dataset

    def load_while_another_starts(directory: Path) -> Dataset:
        monkeypatch.undo()
        with pytest.raises(ConfigError, match=r"breaker\.work', which another run is working in"):
            run_training(recipe, tmp_path / "breaker", data_dir=data_dir, resume=False)
        (tmp_path / "breaker.work" / "touched").rmdir()
        return load(directory)

    (tmp_path / "breaker.work" / "touched").mkdir(parents=True)
    (tmp_path / "breaker.work" / "circuit-breakers-work.json").write_text("{}")
    monkeypatch.setattr(pipeline, "load_dataset", load_while_another_starts)
    probe = recipe.probe.model_copy(update={"target_fpr": 0.01})
    # The second time, nothing of the first is in its way.
    for _ in range(2):
        with pytest.raises(CalibrationError, match="got 70 benign"):
            run_training(
                recipe.model_copy(update={"probe": probe}), tmp_path / "breaker", data_dir=data_dir
            )
    assert not (tmp_path / "breaker.work" / "touched").exists(), "another run was refused"


def test_breaker_name_is_a_label() -> None:
    assert breaker_name("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert breaker_name("Qwen/Qwen3-0.6B") == "qwen-qwen3-0.6b"
    assert breaker_name("???") == "breaker"
