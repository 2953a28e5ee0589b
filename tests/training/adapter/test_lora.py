"""The adapter against PEFT's own forward pass."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.lora import Adapter
from circuit_breakers_training.recipes.config import LoraRecipe, Recipe

from ..architectures import write_model

RECIPE = Recipe(model="tiny", lora=LoraRecipe(rank=4, alpha=12, b_init_std=0.1))
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp("model"))


def test_states_and_gradients_equal_those_of_peft(directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    adapter = Adapter(model, RECIPE, [1, 2])
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(parameter.bfloat16().float())  # as they are saved
    adapter.save(tmp_path, base_name="tiny")
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    ours, theirs = model(IDS).logits, peft(IDS).logits
    # The same products in float32, added up in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    assert adapter.parameters.keys() == expected.keys()
    for name, parameter in adapter.parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-2)


def test_dropout_is_off_until_switched_on(directory: Path) -> None:
    lora = RECIPE.lora.model_copy(update={"dropout": 0.5})
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    adapter = Adapter(model, RECIPE.model_copy(update={"lora": lora}), [1])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        adapter.set_dropout(True)
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_adapter_of_a_bfloat16_model_is_float32(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    adapter = Adapter(model, RECIPE, [1])
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_module_that_the_model_lacks_is_refused(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    lora = RECIPE.lora.model_copy(update={"target_modules": ("nope_proj",)})
    with pytest.raises(ConfigError, match=r"names \['nope_proj'\]"):
        Adapter(model, RECIPE.model_copy(update={"lora": lora}), [1])
