"""The whole line on a tiny random model: from conversations to a breaker that loads and fits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers.artifact import load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers.models import resolve_model
from circuit_breakers_training import stages
from circuit_breakers_training.pipeline import run_training
from circuit_breakers_training.probe import stages as probe_stages
from circuit_breakers_training.recipes.config import DataRecipe, Recipe
from circuit_breakers_training.recipes.resolution import resolve_recipe
from circuit_breakers_training.render import PLAIN_TEMPLATE, load_tokenizer, render_prompt
from circuit_breakers_training.report import rebuild_report
from circuit_breakers_training.run_log import read_metrics

from .conftest import make_conversations
from .two_processes import launch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, data_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "breaker"
    run_training(recipe, out, data_dir=data_dir)
    return out


def test_breaker_loads_and_fits_its_model(trained: Path, recipe: Recipe, data_dir: Path) -> None:
    breaker = load_breaker(trained)
    breaker.check_fits(resolve_model(recipe.model).spec())
    manifest = breaker.manifest
    assert manifest.recipe == recipe.model_dump(mode="json")
    # The model's own template is not copied.
    assert breaker.chat_template is None
    assert manifest.data_sha256 == json.loads((data_dir / "dataset.json").read_text())["sha256"]
    (probe,) = manifest.probes
    assert probe.calibration.num_conversations == 70
    assert probe.calibration.fpr_upper_bound <= 0.05
    # 70 conversations support 5 % (59 are needed) and nothing stricter of the ladder (149).
    assert [point.target_fpr for point in probe.calibration.curve] == [0.1, 0.05]
    # Of each of the 70 benign calibration conversations, not of the 5 harmful ones.
    histogram = probe.calibration.histogram
    assert histogram is not None
    assert {phase: sum(bins.counts) for phase, bins in histogram.items()} == {
        "prompt": 70,
        "completion": 70,
    }


def test_texts_behind_a_refused_request_are_a_kind_of_their_own() -> None:
    benign, other = make_conversations("benign", 2, 3)
    assert stages.text_stratum(replace(benign, source="chat")) == "benign: chat"
    after = replace(benign, source="follow_up", category="after_refusal")
    assert stages.text_stratum(after) == "refused: follow_up"
    assert stages.text_stratum(replace(other, source="s", kind="refusal")) == "refused: s"
    (harmful,) = make_conversations("harmful", 1, 3)
    assert stages.text_stratum(replace(harmful, source="s")) == "harmful: s"


def test_canaries_hold_on_the_checkpoint_that_serving_merges(
    trained: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path))
    breaker = load_breaker(trained)
    path = merged_checkpoint(resolve_model(recipe.model), breaker)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    (probe,) = breaker.manifest.probes
    weights = breaker.weights[probe.name]
    assert len(breaker.manifest.canaries) == 4
    for canary in breaker.manifest.canaries:
        ids = render_prompt(tokenizer, canary.messages)
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        parts = [
            hidden[layer + 1][0].numpy() @ weight_D
            for layer, weight_D in zip(probe.read_layers, weights.weight_LD, strict=True)
        ]
        logit_T = sum(parts) + np.float32(weights.bias)
        peak = aggregate(logit_T, probe.aggregation).max()
        assert (peak >= probe.threshold_logit) == (canary.label == "harmful")


def test_report_says_what_was_measured(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    report = (trained / "report.md").read_text()
    # 60 words in 32 dimensions: a linear probe gets most, not all; 0.87 was measured.
    assert metrics["test"]["conversation"]["auroc"] > 0.8
    assert f"{metrics['test']['conversation']['auroc']:.3f}" in report
    # Blocks 1, 2 and both, under two aggregations each.
    assert [c["layers"] for c in metrics["selection"]] == [[1], [1], [2], [2], [1, 2], [1, 2]]
    assert sum(c["chosen"] for c in metrics["selection"]) == 1
    assert set(metrics["perplexity"]) >= {"benign: even", "benign: odd", "harmful: even"}
    assert len(metrics["generations"]) == 10
    assert set(metrics["seconds"]) == {"adapter", "probe", "scores", "texts", "long", "total"}
    assert len(metrics["test"]["operating_points"]) == 2
    # The tiny model reads 128 tokens.
    assert metrics["long_context"]["benign_run"]["num"] == 4
    assert 50 < metrics["long_context"]["num_benign_tokens"]["min"] < 128
    assert metrics["beyond_calibrated_length"]["extrapolated"] is True
    for plot in ("loss", "cosine", "roc"):
        png = (trained / "plots" / f"{plot}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 60_000
    page = (trained / "report.html").read_text()
    # Losses, coefficients, cosines, two ROC curves, operating points, tokens up to the trip.
    assert page.count("<svg") == 7
    assert str(trained.parent) not in report + page + json.dumps(metrics)


def test_report_can_be_made_again(trained: Path, tmp_path: Path) -> None:
    rebuilt = rebuild_report(trained, tmp_path / "again.html")
    said = "that of manifest.json, which covers this file"
    before = (trained / "report.html").read_text()
    assert before.replace(said, load_breaker(trained).digest) == rebuilt.page.read_text()
    metrics = json.loads((trained / "metrics.json").read_text())
    weights = load_breaker(trained).manifest.files["adapter/adapter_model.safetensors"]
    assert metrics["adapter_sha256"] == weights
    assert metrics["training_log"]["step"] == list(range(1, 21))
    # 30 benign and 20 harmful ones, half of each from "even" and half from "odd".
    assert metrics["data_counts"]["test"] == {
        "benign": {"even": 15, "odd": 15},
        "harmful": {"even": 10, "odd": 10},
    }
    assert metrics["data_lengths"]["calibration"] == {
        "num": 75,
        "num_truncated": 0,
        "num_dropped": 0,
    }
    fit = metrics["probe_fit"]
    assert (fit["num_conversations"], fit["num_repeats"], fit["is_reduced"]) == (140, 0, False)
    # Each of the tiny conversations is a group of its own.
    calibration = metrics["probe"]["calibration"]
    assert metrics["calibration_groups"] == {
        "num": 70,
        "num_trips": calibration["num_trips"],
        "upper_bound": calibration["fpr_upper_bound"],
    }
    # The adapter is on blocks 0 to 2, and block 2 is rerouted.
    assert list(metrics["adapter"]["harmful_cosine_by_layer"]) == ["0", "1", "2"]
    assert set(metrics["peak_rss_mib_by_stage"]) == set(metrics["seconds"]) - {"total"}


def test_finished_stages_are_not_done_again(
    trained: Path, recipe: Recipe, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.with_name("breaker.work"), tmp_path / "again.work")

    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(probe_stages, "ResidualReader", never)
    for name in ("LanguageModel", "merge_adapter"):
        monkeypatch.setattr(stages, name, never)
    again = run_training(recipe, tmp_path / "again", data_dir=data_dir)
    first = load_breaker(trained)
    assert again.manifest.probes == first.manifest.probes
    assert again.manifest.canaries == first.manifest.canaries


def test_a_changed_probe_recipe_keeps_the_adapter(
    trained: Path, recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.with_name("breaker.work"), tmp_path / "other.work")
    probe = recipe.probe.model_copy(update={"candidate_depths": (0.25,)})
    changed = recipe.model_copy(update={"probe": probe})
    other = run_training(changed, tmp_path / "other", data_dir=data_dir)
    first = load_breaker(trained)
    assert other.manifest.probes[0].layer == 0
    weights = "adapter/adapter_model.safetensors"
    assert other.manifest.files[weights] == first.manifest.files[weights]


def test_a_probe_of_several_blocks_is_saved_as_one(
    trained: Path, recipe: Recipe, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.with_name("breaker.work"), tmp_path / "wide.work")
    # Whatever the selection split says: the last candidate reads both blocks.
    monkeypatch.setattr(probe_stages, "best_candidate", lambda qualities: len(qualities) - 1)
    probe = recipe.probe.model_copy(update={"l2_C": 0.05})
    wide = run_training(
        recipe.model_copy(update={"probe": probe}), tmp_path / "wide", data_dir=data_dir
    )
    (spec,) = load_breaker(wide.path).manifest.probes
    assert (spec.name, spec.layer, spec.layers) == ("layers1-2", None, (1, 2))
    assert wide.weights[spec.name].weight_D.shape == (2, 32)
    assert "layer 1 + 2" in (wide.path / "report.md").read_text()
    assert not list((tmp_path / "wide.work").glob("fit-tokens-*")), "what was fitted on is gone"


def test_same_recipe_and_data_give_the_same_probe(
    trained: Path, recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    again = run_training(recipe, tmp_path / "again", data_dir=data_dir)
    first = load_breaker(trained)
    assert again.manifest.probes == first.manifest.probes
    assert again.manifest.files["probes.safetensors"] == first.manifest.files["probes.safetensors"]


def test_a_breaker_brings_the_template_that_its_model_lacks(
    tiny_gpt2: Path, recipe: Recipe, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path / "cache"))
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_gpt2, model_dir)
    (model_dir / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(model_dir).chat_template is None
    plain = recipe.model_copy(
        update={
            "model": str(model_dir),
            "chat_template": "plain",
            "data": DataRecipe(blank_prompt_share=0.5),
        }
    )
    breaker = run_training(plain, tmp_path / "breaker", data_dir=data_dir)
    assert breaker.chat_template == tmp_path / "breaker" / "chat_template.jinja"
    assert breaker.chat_template.read_text() == PLAIN_TEMPLATE
    assert breaker.manifest.recipe["chat_template"] == "plain"
    metrics = json.loads((tmp_path / "breaker" / "metrics.json").read_text())
    assert 0 < metrics["adapter"]["num_blanked"] < 60
    # What the server loads renders as training did.
    merged = merged_checkpoint(resolve_model(plain.model), breaker)
    served = AutoTokenizer.from_pretrained(merged)
    (canary, *_) = breaker.manifest.canaries
    trained_on = render_prompt(load_tokenizer(model_dir, "plain"), canary.messages)
    assert render_prompt(served, canary.messages) == trained_on


RECIPE_TOML = """
model = "{model}"
steps = 20
batch_size = 8
max_length = 64
learning_rate = 5e-3
precision = "fp32"
objective = {{ retain_weight = 10.0 }}
lora = {{ rank = 4, b_init_std = 0.02 }}
[probe]
candidate_depths = [0.5, 0.75]
aggregations = [{{ kind = "rolling_mean", window = 4 }}, {{ kind = "max" }}]
l2_C = 0.1
target_fpr = 0.05
fpr_ladder = [0.1, 0.02]
long_conversations = 4
"""


def test_two_processes_make_one_breaker(
    trained: Path, recipe: Recipe, data_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE_TOML.format(model=recipe.model))
    assert resolve_recipe(str(file)).recipe == recipe
    out = tmp_path / "breaker"
    shown = launch(
        *("-m", "circuit_breakers.cli", "train", "--recipe", str(file)),
        *("--data", str(data_dir), "--out", str(out)),
    )
    # The main process alone reports.
    assert shown.count("ok: breaker") == 1
    ours, theirs = (
        read_metrics(next(path.with_name(f"{path.name}.work").glob("adapter-*/metrics.jsonl")))
        for path in (out, trained)
    )
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=1e-3)
    assert (
        load_breaker(out).manifest.probes[0].layer == load_breaker(trained).manifest.probes[0].layer
    )
