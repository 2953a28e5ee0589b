"""The base model as training runs it: frozen, cut, and packed where its attention allows it.

No block above the deepest target is kept, and no language-model head: neither loss depends on them.

B rows, T tokens, N tokens of a stream, D model width
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers_training.adapter.packed_attention import ATTENTION_NAME
from circuit_breakers_training.batches import pack_rows
from circuit_breakers_training.blocks import decoder_blocks, record_outputs
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered

__all__ = ["drop_head", "load_base", "use_packed_attention"]

logger = logging.getLogger(__name__)

_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of attention, as transformers' configs name them, that packed rows can have."""
_TRIAL_LENGTHS = (7, 4)
_TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative difference of a token's state between two orders of rounding; a token that sees another
row's is off by about 1."""


def load_base(recipe: Recipe, model_dir: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole model, frozen and in evaluation mode.

    Raises:
        ModelError: the directory holds no decoder that can be loaded.
        ConfigError: quantization that this machine cannot do.
    """
    placement = _quantized(recipe, device, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **placement,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load {str(model_dir)!r}: {error}; expected a directory with config.json and "
            "safetensors weights of a causal language model; check the path"
        ) from error
    if not placement:
        model.to(device)
    # Dropout and other training behaviour of the base would make the two streams differ.
    return model.eval().requires_grad_(False)


def drop_head(model: Any) -> None:
    """Free the language-model head, where there is one; in place."""
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(nn.Identity())


def use_packed_attention(model: Any) -> bool:
    """Switch a model over to packed rows, in place; False leaves it as it was, and says why.

    Two short rows are run packed and, by the model's own attention, apart; only a model whose
    states agree is switched.
    """
    reason = _mismatch(model)
    if reason is None:
        return True
    model.set_attn_implementation("eager")
    logger.warning("%s is run on padded rows, which is slower: %s", type(model).__name__, reason)
    return False


def _mismatch(model: Any) -> str | None:
    """Why this model cannot be run packed; None, and the model switched over, if it can."""
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _PACKED_LAYERS)
    if others:
        return f"it has layers of {', '.join(others)}"
    # Implementations without a mask get all they have to know as arguments only from models that
    # support flash attention.
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return "its attention does not go through transformers' attention interface"
    last = decoder_blocks(model)[-1]
    rows = [
        Rendered(ids=tuple((5 * i + n) % config.vocab_size for i in range(n)), num_prompt_tokens=0)
        for n in _TRIAL_LENGTHS
    ]
    on_trial = all(_is_whole(parameter) for parameter in model.parameters())
    if on_trial:
        ids = [torch.tensor([row.ids], device=model.device) for row in rows]
        apart_ND = torch.cat([_states(model, last, ids_1T)[0] for ids_1T in ids])
    model.set_attn_implementation(ATTENTION_NAME)
    if not on_trial:
        return None
    batch = pack_rows(rows, ["all"] * len(rows), model.device)
    arguments = {"position_ids": batch.position_BT, "packed_layout": batch.layout}
    try:
        packed_BTD = _states(model, last, batch.ids_BT, **arguments)
    except (ModelError, TypeError) as error:
        return str(error)
    # Weights may still be zero, where another process is going to send them.
    norm_N = apart_ND.norm(dim=-1).clamp_min(1e-30)
    error_N = (packed_BTD.flatten(0, 1)[batch.counted_C] - apart_ND).norm(dim=-1) / norm_N
    worst = error_N.max().item()
    if not worst <= _TRIAL_TOLERANCE.get(model.dtype, 0.1):
        return f"states of packed rows differ from those of rows apart by {worst:.2g}"
    return None


def _is_whole(parameter: nn.Parameter) -> bool:
    """Not spread over processes, and not without memory."""
    return not parameter.is_meta and parameter.numel() > 0


@torch.no_grad()
def _states(model: Any, block: nn.Module, ids_BT: Tensor, **arguments: Any) -> Tensor:
    """(B, T, D) output of `block`, float32."""
    with record_outputs([block]) as outputs:
        model.base_model(ids_BT, use_cache=False, **arguments)
    return outputs[0].float()


def _quantized(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained that load base weights in 4 bits; none without quantization."""
    if recipe.quantization == "none":
        return {}
    if device.type != "cuda":
        raise ConfigError(
            f"quantization {recipe.quantization!r} runs on a CUDA device only, got device "
            f"{str(device)!r}; set quantization = 'none' or train on a GPU"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {recipe.quantization!r} needs the package bitsandbytes, which is not "
            "installed; pip install bitsandbytes"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
