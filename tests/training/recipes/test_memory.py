from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.recipes.config import LoraRecipe, ObjectiveRecipe, Recipe
from circuit_breakers_training.recipes.memory import TrainingShape, training_shape
from circuit_breakers_training.render import Rendered

RECIPE = Recipe(model="m", batch_size=4, max_length=32, lora=LoraRecipe(rank=4))

_SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = _ATTENTION | {"gate_proj", "up_proj", "down_proj"}
# rank * (in + out) of each module of a block. Width 32, keys and values 16, hidden 64:
_GATED_PARAMETERS = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
CONFIGS: dict[str, tuple[PretrainedConfig, set[str], int]] = {
    "llama": (LlamaConfig(**_SIZES), _GATED, _GATED_PARAMETERS),
    "mistral": (MistralConfig(**_SIZES, sliding_window=16), _GATED, _GATED_PARAMETERS),
    "qwen3": (Qwen3Config(**_SIZES, head_dim=8), _GATED, _GATED_PARAMETERS),
    "gemma3": (
        Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=16),
        _GATED,
        _GATED_PARAMETERS,
    ),
    "gpt2": (
        GPT2Config(
            vocab_size=80,
            n_embd=32,
            n_layer=6,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=1,
        ),
        {"c_attn", "c_proj", "c_fc"},
        # attention in and out, and 4 times the width in between.
        4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)),
    ),
}


def shape_of(recipe: Recipe, model_dir: Path, num_tokens: int = 32) -> TrainingShape:
    return training_shape(recipe, model_dir, num_tokens=num_tokens)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_decoder_is_counted_from_its_config_alone(kind: str, tmp_path: Path) -> None:
    config, modules, parameters_of_block = CONFIGS[kind]
    config.save_pretrained(tmp_path)
    shape = shape_of(RECIPE, tmp_path)
    assert (shape.num_layers, shape.hidden_size, shape.max_positions) == (6, 32, 128)
    assert set(shape.modules) == modules
    # 2/3 of 6 blocks: the adapter is on blocks 0 to 3.
    assert shape.num_trained == 4 * parameters_of_block
    assert shape.num_base == AutoModelForCausalLM.from_config(config).num_parameters()
    memory = shape.memory
    assert memory.loading == 2 * shape.num_base
    assert 0 < memory.weights < memory.loading
    assert memory.adapter == 16 * shape.num_trained
    assert memory.peak == memory.weights + memory.adapter + memory.activations


def test_a_model_that_training_refuses_is_refused(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**_SIZES, "head_dim": 8}
    # Its decoder lies below a model that sees images, too.
    Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected exactly one"):
        shape_of(RECIPE, tmp_path)


def test_modules_and_layers_that_are_not_there_are_refused(tiny_llama: Path) -> None:
    lora = LoraRecipe(target_modules=("c_attn",))
    with pytest.raises(ConfigError, match=r"target_modules names \['c_attn'\]"):
        shape_of(RECIPE.model_copy(update={"lora": lora}), tiny_llama)
    with pytest.raises(ConfigError, match="4 blocks allows 0 to 2"):
        shape_of(RECIPE.model_copy(update={"layers": (3,)}), tiny_llama)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_trained_parameters_are_those_of_the_training(
    model: str, request: pytest.FixtureRequest
) -> None:
    model_dir: Path = request.getfixturevalue(model)
    recipe = RECIPE.model_copy(update={"lora": LoraRecipe(rank=4, first_depth=0.3)})
    streams = Streams(recipe, model_dir, torch.device("cpu"))
    trained = sum(p.numel() for p in streams.parameters.values())
    assert shape_of(recipe, model_dir).num_trained == trained


def kept_for_backward(recipe: Recipe, model_dir: Path, num_rows: int) -> int:
    """Bytes of all tensors, weights aside, that autograd holds after a step's forward pass."""
    streams = Streams(recipe, model_dir, torch.device("cpu"))
    streams.set_dropout(True)
    weights = {p.untyped_storage().data_ptr() for p in streams.module.parameters()}
    pieces: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            pieces[address] = tensor
        return tensor

    row = Rendered(ids=(5,) * recipe.max_length, num_prompt_tokens=1)
    states: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch = streams.batch([row] * num_rows, ["all"] * num_rows)
        streams.compare(batch, lambda _layer, adapted, base: states.extend((adapted, base)))
    assert states[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in pieces.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_activations_are_a_little_more_than_a_real_step_keeps(
    model: str, precision: str, dropout: float, request: pytest.FixtureRequest
) -> None:
    model_dir: Path = request.getfixturevalue(model)
    lora = LoraRecipe(rank=4, dropout=dropout)
    recipe = RECIPE.model_copy(update={"precision": precision, "max_length": 64, "lora": lora})
    # 4 benign and 4 harmful conversations.
    kept = kept_for_backward(recipe, model_dir, num_rows=8)
    # A mask per block, the output of attention, and the base stream's state at the target.
    assert kept < shape_of(recipe, model_dir, 64).memory.activations < 1.35 * kept


def test_smaller_parts_and_checkpointing_take_less(tiny_llama: Path) -> None:
    def activations(**fields: object) -> int:
        recipe = Recipe.model_validate(RECIPE.model_dump() | fields)
        return shape_of(recipe, tiny_llama).memory.activations

    whole = activations()
    # Of what is kept, only the adapter's own casts do not grow with the rows.
    assert activations(micro_batch_size=1) == pytest.approx(whole / 4, rel=0.1)
    assert activations(gradient_checkpointing=True) < 0.5 * whole
    assert activations(lora={"rank": 4, "dropout": 0.1}) > whole
    # Every block's state is kept instead of the target's: 2 more of 3, bfloat16.
    more = activations(objective=ObjectiveRecipe(retain_layers="all")) - whole
    assert more == 2 * (8 * 32 * 32) * 2


def test_longer_conversations_take_more_up_to_the_context(tiny_gpt2: Path) -> None:
    def activations(num_tokens: int) -> int:
        return shape_of(RECIPE, tiny_gpt2, num_tokens).memory.activations

    assert activations(16) < activations(128) == activations(4096)


def test_4_bit_weights_take_less_than_a_third(tiny_llama: Path) -> None:
    quantized = RECIPE.model_copy(update={"quantization": "nf4"})
    small, whole = (shape_of(r, tiny_llama).memory.loading for r in (quantized, RECIPE))
    # 4 blocks of 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 linear weights: 2 bytes each become
    # 4 bits, 1/64 of a byte and 1/16,384 of a float32.
    linear = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert whole - small == linear * (2 - 0.5 - 1 / 64 - 4 / 16384)
