"""A model without its weights: what its config and tokenizer alone say.

Tensors of a skeleton have shape and dtype and no memory, so that a model of any size can be looked
at on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from circuit_breakers.builtin_models import BUILTIN_MODELS
from circuit_breakers.errors import ModelError
from circuit_breakers.models import resolve_model
from circuit_breakers_training.render import load_tokenizer

__all__ = ["count_parameters", "has_chat_template", "local_model_dir", "model_skeleton"]


def model_skeleton(model_dir: Path, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The causal language model of `model_dir` on the meta device; only config.json is read.

    Raises:
        ModelError: config.json is missing, or is not that of a causal language model that
            transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                # Plain attention, as training uses.
                attn_implementation="eager",
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the model in {str(model_dir)!r}: {error}; expected config.json of a "
            "causal language model that transformers knows; check the path"
        ) from error


def count_parameters(model_dir: Path) -> int:
    """Number of weights of the base model; shared ones count once.

    Raises:
        ModelError: the config cannot be read.
    """
    return sum(p.numel() for p in model_skeleton(model_dir).parameters())


def has_chat_template(model_dir: Path) -> bool:
    """Whether the model's tokenizer has a chat template of its own.

    Raises:
        ModelError: there is no tokenizer.
    """
    return load_tokenizer(model_dir, "model").chat_template is not None


def local_model_dir(name: str) -> Path:
    """Directory with the config of a model, without downloading anything.

    Weights need not be there. A built-in model is converted on its first use, as ever.

    Raises:
        ModelError: nothing of that name is on this machine.
    """
    if name in BUILTIN_MODELS:
        return resolve_model(name).path
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # Deferred: only hub ids need it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise ModelError(
        f"model {name!r} is not on this machine, expected a built-in name, a directory with "
        "config.json, or a hub id whose config.json is in the hub cache; a directory with "
        "config.json and tokenizer alone is enough for a plan"
    )
