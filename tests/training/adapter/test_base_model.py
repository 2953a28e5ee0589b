from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers_training.adapter.base_model import drop_head, load_base, use_packed_attention
from circuit_breakers_training.adapter.packed_attention import ATTENTION_NAME
from circuit_breakers_training.recipes.config import Recipe

from ..architectures import PACKED, PADDED, write_model

CPU = torch.device("cpu")
RECIPE = Recipe(model="tiny")


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_that_can_be_packed_are(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load_base(RECIPE, write_model(architecture, tmp_path), CPU, dtype)
    assert use_packed_attention(model)
    assert model.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize("architecture", PADDED)
def test_architectures_that_cannot_be_packed_are_left_and_named(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(RECIPE, write_model(architecture, tmp_path), CPU, torch.float32)
    with caplog.at_level(logging.WARNING):
        assert not use_packed_attention(model)
    assert model.config._attn_implementation == "eager"
    assert f"{type(model).__name__} is run on padded rows" in caplog.text


def test_a_model_whose_packed_states_differ_is_not_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(RECIPE, write_model("gpt2", tmp_path), CPU, torch.float32)
    forward = model.transformer.forward
    # A model that counts positions itself, whatever it is given.
    model.transformer.forward = lambda *a, position_ids=None, **k: forward(*a, **k)
    with caplog.at_level(logging.WARNING):
        assert not use_packed_attention(model)
    assert "states of packed rows differ" in caplog.text


def test_base_is_frozen_and_has_no_dropout(tmp_path: Path) -> None:
    model = load_base(RECIPE, write_model("gpt2", tmp_path), CPU, torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert model.dtype == torch.bfloat16


def test_head_is_gone_and_states_are_the_same(tmp_path: Path) -> None:
    directory = write_model("llama", tmp_path)
    model = load_base(RECIPE, directory, CPU, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    drop_head(model)
    assert "lm_head.weight" not in dict(model.named_parameters())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, theirs = (m.base_model(ids).last_hidden_state for m in (model, whole))
    torch.testing.assert_close(ours, theirs)


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        load_base(RECIPE, tmp_path, CPU, torch.float32)


def test_quantization_on_a_cpu_is_refused(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"quantization": "nf4"})
    with pytest.raises(ConfigError, match="CUDA device only, got device 'cpu'"):
        load_base(recipe, tmp_path, CPU, torch.bfloat16)
