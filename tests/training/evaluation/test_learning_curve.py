from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.data.dataset import SCHEMA_VERSION, load_dataset, write_dataset
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.evaluation import learning_curve as module
from circuit_breakers_training.evaluation.learning_curve import (
    CurveSettings,
    Variant,
    learning_curve,
    parse_variant,
    print_curve,
)
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 4
SUITES = ("direct", "prefill", "wrappers", "past-tense")


@pytest.fixture(scope="module")
def curve(
    roomy_llama: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("curve")
    recipe = out / "tiny.toml"
    recipe.write_text(f'model = "{roomy_llama}"\nsteps = 3\nbatch_size = 2\nprecision = "fp32"\n')
    settings = CurveSettings(
        data=data_dir,
        out=out / "results",
        recipe=str(recipe),
        variants=(
            parse_variant("data_share=0.5"),
            parse_variant("data_share=1"),
            parse_variant("steps=2; batch_size=3"),
            parse_variant("steps=20; learning_rate=1e-9; lora.b_init_std=1e-6"),
        ),
        limit=LIMIT,
        max_new_tokens=8,
        backend="transformers",
    )
    results = learning_curve(settings)
    assert learning_curve(settings) == results, "a second run takes the adapters that are there"
    return results, settings.out


def test_there_is_a_row_for_the_base_model_and_each_variant(
    curve: tuple[dict[str, Any], Path], data_dir: Path
) -> None:
    results, out = curve
    assert json.loads((out / "curve-test.json").read_text()) == results
    *rows, pinned = results["rows"]
    names = [row["variant"] for row in rows]
    assert names == ["base model", "data_share=0.5", "data_share=1", "steps=2; batch_size=3"]
    assert "after 10 of 20 steps the adapter reroutes nothing" in pinned["pinned"]
    for row in rows:
        assert tuple(row["suites"]) == SUITES
        assert all(suite["num"] == LIMIT for suite in row["suites"].values())
    _, half, whole, short = rows
    train = load_dataset(data_dir).train
    assert whole["num_harmful"] == sum(row.label == "harmful" for row in train)
    assert 0 < half["num_harmful"] < whole["num_harmful"]
    assert 0 < half["num_benign"] < whole["num_benign"]
    assert (whole["steps"], short["steps"]) == (3, 2)
    for row in (half, whole, short):
        of_all = row["benign_perplexity"]["perplexity"]["all"]
        assert of_all["adapter_change"] == pytest.approx(of_all["adapter"] / of_all["base"] - 1)
        assert of_all["adapter"] != of_all["base"]


def test_adapters_are_kept_and_merged_checkpoints_are_not(
    curve: tuple[dict[str, Any], Path],
) -> None:
    _, out = curve
    assert sorted(p.name.split("-")[0] for p in out.iterdir()) == ["adapter"] * 4 + ["curve"]


def test_the_table_has_every_variant(
    curve: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    print_curve(curve[0])
    printed = capsys.readouterr().out
    assert all(part in printed for row in curve[0]["rows"] for part in row["variant"].split("; "))
    assert "pinned" in printed


def test_parts_of_a_variant_go_together() -> None:
    variant = parse_variant("layers=[1, 2]; data_share=0.25; objective.retain_weight=4")
    assert [(o.field, o.value) for o in variant.overrides] == [
        ("layers", [1, 2]),
        ("objective.retain_weight", 4),
    ]
    assert variant.data_share == 0.25
    assert variant.name == "layers=[1, 2]; data_share=0.25; objective.retain_weight=4"


def test_the_selection_split_is_asked_instead(
    curve: tuple[dict[str, Any], Path], roomy_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(data_dir)
    swapped = {name: list(getattr(dataset, name)) for name in SPLITS}
    swapped["selection"], swapped["test"] = swapped["test"], swapped["selection"]
    write_dataset(tmp_path / "swapped", swapped, {"schema_version": SCHEMA_VERSION})
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'model = "{roomy_llama}"\nsteps = 2\nbatch_size = 2\nprecision = "fp32"\n')
    settings = CurveSettings(
        data=tmp_path / "swapped",
        out=tmp_path / "results",
        recipe=str(recipe),
        variants=(parse_variant("steps=2"),),
        split="selection",
        limit=LIMIT,
        max_new_tokens=8,
        backend="transformers",
    )
    results = learning_curve(settings)
    assert json.loads((tmp_path / "results" / "curve-selection.json").read_text()) == results
    # The same conversations as the other curve asks, and so the same base model.
    (base, row), (other_base, other, *_) = results["rows"], curve[0]["rows"]
    assert base == other_base
    found, expected = row["benign_perplexity"], other["benign_perplexity"]
    assert found["num_conversations"] == expected["num_conversations"]
    assert found["perplexity"]["all"]["base"] == expected["perplexity"]["all"]["base"]


def test_a_base_model_is_trained_and_asked_on_the_plain_template_where_training_runs(
    base_gpt2: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    class Recorded(Processes):
        def __init__(self, recipe: Recipe, device: str) -> None:
            devices.append(device)
            super().__init__(recipe, "cpu")

    monkeypatch.setattr(module, "Processes", Recorded)
    monkeypatch.setattr(module, "pick_device", lambda: "cuda")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f'model = "{base_gpt2}"\nsteps = 2\nbatch_size = 2\nprecision = "fp32"\n'
        'chat_template = "auto"\n'
    )
    settings = CurveSettings(
        data=data_dir,
        out=tmp_path / "results",
        recipe=str(recipe),
        variants=(parse_variant("steps=2"),),
        limit=LIMIT,
        max_new_tokens=8,
        backend="transformers",
    )
    base, row = learning_curve(settings)["rows"]
    assert all(side["suites"]["direct"]["num"] == LIMIT for side in (base, row))
    assert row["benign_perplexity"]["num_conversations"]["all"] == 2 * LIMIT
    assert devices == ["cuda"]


@pytest.mark.parametrize(
    "text", ["data_share=0", "steps=2; data_share=0", "data_share=1.5", "data_share=true", "steps"]
)
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_variant(text)


@pytest.mark.parametrize("other", ['model="other"', 'chat_template="plain"'])
def test_variants_of_other_models_are_refused(data_dir: Path, tmp_path: Path, other: str) -> None:
    settings = CurveSettings(
        data=data_dir,
        out=tmp_path,
        recipe="smollm2-135m-instruct",
        variants=(Variant(name="as it is"), parse_variant(other)),
    )
    with pytest.raises(ConfigError, match="expected one model and one chat template"):
        learning_curve(settings)
