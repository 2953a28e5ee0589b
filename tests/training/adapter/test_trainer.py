"""Whole training runs on tiny models, and what a user can get wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers.errors import ConfigError, DataError, ModelError
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter
from circuit_breakers_training.recipes.config import DataRecipe, Recipe
from circuit_breakers_training.render import Rendered
from circuit_breakers_training.run_log import read_metrics

from ..tiny_recipes import GPT2, LLAMA, Conversations
from .target_states import target_states

pytestmark = pytest.mark.usefixtures("one_thread")


# --- whole runs --------------------------------------------------------------------------------


def assert_reroutes(recipe: Recipe, model_dir: Path, rows: Conversations, out: Path) -> None:
    recipe = recipe.model_copy(update={"steps": 300})
    result = train_adapter(recipe, model_dir=model_dir, rows=TrainingRows(**rows), out=out)
    assert result.benign_cosine is not None
    assert result.harmful_cosine is not None
    # Both are 1 before training.
    assert result.benign_cosine > 0.9
    assert result.harmful_cosine < 0.3
    assert set(result.benign_cosine_by_source) == {"even", "odd"}
    layers = [str(layer) for layer in range(max(result.target_layers) + 1)]
    for overall, by_layer in (
        (result.benign_cosine, result.benign_cosine_by_layer),
        (result.harmful_cosine, result.harmful_cosine_by_layer),
    ):
        assert list(by_layer) == layers
        # Each conversation counts as much at each layer, and the targets alone in the whole.
        at_targets = [by_layer[str(layer)] for layer in result.target_layers]
        assert sum(at_targets) / len(at_targets) == pytest.approx(overall, abs=1e-9)
    # The streams part from block to block.
    parted = list(result.harmful_cosine_by_layer.values())
    assert 1 > parted[0] > parted[-1]
    metrics = read_metrics(result.metrics_path)
    assert [entry["step"] for entry in metrics] == list(range(1, recipe.steps + 1))
    assert metrics[-1]["reroute_cosine"] < metrics[0]["reroute_cosine"]
    assert metrics[0]["retain_coefficient"] == 0.0
    assert 0 <= metrics[0]["padding_share"] < 0.6
    assert not (out / "checkpoint.safetensors").exists()


def assert_peft_reproduces(model_dir: Path, out: Path, recipe: Recipe) -> None:
    """A stock PEFT model with the saved adapter has the hidden states that training saw."""
    streams = Streams(recipe, model_dir, torch.device("cpu"))
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    with torch.no_grad():
        for name, parameter in streams.parameters.items():
            parameter.copy_(saved[name.replace(".default", "")])
    row = Rendered(ids=(5, 6, 40, 41, 12, 70), num_prompt_tokens=0)
    [(adapted_CD, base_CD)] = target_states(streams, streams.batch([row], ["all"]))
    whole = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    peft = PeftModel.from_pretrained(whole, out / "adapter").eval()
    with torch.no_grad():
        states = peft(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    target = streams.targets[0]
    torch.testing.assert_close(adapted_CD, states[target + 1][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base_CD, states[target + 1][0], rtol=1e-2, atol=1e-2)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model
    assert config["layers_to_transform"] == list(range(target + 1))
    assert config["inference_mode"] is True


def test_tiny_llama_is_rerouted_and_benign_stays(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    assert_reroutes(LLAMA, tiny_llama, conversations, tmp_path)
    assert_peft_reproduces(tiny_llama, tmp_path, LLAMA)


def test_tiny_gpt2_with_conv1d_is_rerouted(
    tiny_gpt2: Path, conversations: Conversations, tmp_path: Path
) -> None:
    assert_reroutes(GPT2, tiny_gpt2, conversations, tmp_path)
    assert_peft_reproduces(tiny_gpt2, tmp_path, GPT2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_bfloat16_run_with_progress_bar(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"precision": "bf16", "steps": 8})
    with (tmp_path / "console").open("w") as file:
        console = Console(file=file, force_terminal=True, width=120)
        train_adapter(
            recipe,
            model_dir=tiny_llama,
            rows=TrainingRows(**conversations),
            out=tmp_path / "run",
            console=console,
        )
    shown = (tmp_path / "console").read_text()
    assert "8/8" in shown
    assert "cosine benign" in shown
    assert "eta" in shown


def test_complete_run_returns_its_result_again(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"steps": 3})
    rows = TrainingRows(**conversations)
    first = train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path)
    written = first.metrics_path.stat().st_mtime_ns
    assert train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path) == first
    assert first.metrics_path.stat().st_mtime_ns == written
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="trained with other settings, weights or data"):
        train_adapter(other, model_dir=tiny_llama, rows=rows, out=tmp_path)


def test_blank_prompts_change_harmful_rows_alone(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    recipe = LLAMA.model_copy(update={"steps": 2})
    blanked = recipe.model_copy(update={"data": DataRecipe(blank_prompt_share=1.0)})
    whole = train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path / "whole")
    blank = train_adapter(blanked, model_dir=tiny_llama, rows=rows, out=tmp_path / "blank")
    assert (whole.num_blanked, blank.num_blanked) == (0, len(rows.harmful))
    # The same conversations in the same order, each harmful one without its 3 to 5 words.
    for before, after in zip(
        read_metrics(whole.metrics_path), read_metrics(blank.metrics_path), strict=True
    ):
        fewer = before["num_tokens"] - after["num_tokens"]
        assert 3 * recipe.batch_size <= fewer <= 5 * recipe.batch_size
    # The result says what it was trained on.
    with pytest.raises(ConfigError, match="trained with other settings, weights or data"):
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path / "blank")


def test_a_model_without_a_template_trains_on_the_plain_one(
    tiny_gpt2: Path, conversations: Conversations, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_gpt2, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    (model_dir / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model_dir)
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    recipe = GPT2.model_copy(update={"steps": 2})
    with pytest.raises(ModelError, match="has no chat template"):
        train_adapter(recipe, model_dir=model_dir, rows=rows, out=tmp_path / "none")
    plain = recipe.model_copy(update={"chat_template": "plain"})
    result = train_adapter(plain, model_dir=model_dir, rows=rows, out=tmp_path / "plain")
    assert result.steps == 2


# --- what a user can get wrong -----------------------------------------------------------------


def test_no_conversation_of_a_kind_is_refused(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=[])
    with pytest.raises(DataError, match="got 0 harmful conversations"):
        train_adapter(LLAMA, model_dir=tiny_llama, rows=rows, out=tmp_path)


def test_module_that_the_model_lacks_is_refused(tiny_gpt2: Path) -> None:
    lora = LLAMA.lora.model_copy(update={"target_modules": ("q_proj",)})
    recipe = LLAMA.model_copy(update={"model": "tiny-gpt2", "lora": lora})
    with pytest.raises(ConfigError, match=r"expected some of .*c_attn"):
        Streams(recipe, tiny_gpt2, torch.device("cpu"))


def test_all_linear_finds_the_modules_of_every_block(tiny_gpt2: Path) -> None:
    recipe = LLAMA.model_copy(update={"model": "tiny-gpt2"})
    streams = Streams(recipe, tiny_gpt2, torch.device("cpu"))
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in streams.parameters}
    assert modules == {"c_attn", "c_proj", "c_fc"}


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        Streams(LLAMA, tmp_path, torch.device("cpu"))


def test_loss_that_is_not_finite_stops_the_run(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    recipe = LLAMA.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(ConfigError, match="expected a finite number; lower learning_rate"):
        train_adapter(
            recipe, model_dir=tiny_llama, rows=TrainingRows(**conversations), out=tmp_path
        )
    assert all(math.isfinite(e["loss"]) for e in read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_last_step_that_loses_the_adapter_leaves_none_to_go_on_with(
    tiny_llama: Path,
    conversations: Conversations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hidden: bool,
) -> None:
    # The squares of so steep a gradient leave float32, and the loss does not.
    recipe = LLAMA.model_copy(
        update={"steps": 1, "objective": LLAMA.objective.model_copy(update={"alpha": 1e25})}
    )
    said = "the norm of the gradient is inf"
    if hidden:

        def norm_as_deepspeed_has_it(model: ParallelStreams) -> float:
            gradient = next(iter(model.streams.parameters.values())).grad
            assert gradient is not None
            gradient.fill_(math.nan)
            return 1.0

        monkeypatch.setattr(ParallelStreams, "clip_gradients", norm_as_deepspeed_has_it)
        said = "the adapter is not finite"
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{said} at step 1, expected a finite number; lower"):
            train_adapter(
                recipe, model_dir=tiny_llama, rows=TrainingRows(**conversations), out=tmp_path
            )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_adapter_that_reroutes_nothing_stops_the_run_at_half(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path
) -> None:
    lora = LLAMA.lora.model_copy(update={"b_init_std": 1e-4})
    recipe = LLAMA.model_copy(update={"steps": 24, "learning_rate": 1e-9, "lora": lora})
    rows = TrainingRows(**conversations)
    with pytest.raises(ConfigError, match=r"after 12 of 24 steps .* reroutes nothing: .* lower"):
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 12
    assert not (tmp_path / "adapter").exists()
