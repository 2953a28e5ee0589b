"""The LoRA adapter: made and saved by PEFT, run in fewer passes over memory than PEFT does.

PEFT casts a layer's input to the adapter's float32, and scales and adds its output in two more
passes. Here both products run in the layer's own dtype, and the second adds to the base output as
it goes. Parameters, their names and the saved file stay PEFT's.

N tokens, R rank
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from circuit_breakers.artifact.files import write_atomically
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.blocks import decoder_blocks
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["Adapter", "add_adapter"]

_NAME = "default"
"""PEFT's name of the one adapter."""


class Adapter:
    """A fresh adapter inside a model, which is changed in place."""

    def __init__(self, model: Any, recipe: Recipe, layers: Sequence[int]) -> None:
        """Seeded by the recipe.

        Args:
            layers: blocks that get it.
        Raises:
            ConfigError: the recipe names modules that the model does not have.
        """
        self._active = True
        self.module = add_adapter(model, recipe, layers)
        """PEFT's model: everything with parameters, for wrappers that shard or synchronise them."""
        self._layers = [m for m in self.module.modules() if isinstance(m, LoraLayer)]
        for layer in self._layers:
            layer.forward = partial(self._forward, layer)
        self.set_dropout(False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By PEFT's names, float32."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def set_dropout(self, active: bool) -> None:
        """Switch dropout for the passes to come."""
        for layer in self._layers:
            layer.lora_dropout.train(active)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Every module computes what its base does, and no gradients."""
        self._active = False
        try:
            with torch.no_grad():
                yield
        finally:
            self._active = True

    def save(
        self, directory: Path, *, base_name: str, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write it as plain PEFT: adapter_config.json and bfloat16 safetensors.

        Args:
            weights: whole parameters by name, where this process holds shards of them only.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # Embeddings are never trained; asking PEFT to find out would look the base up on the hub.
        state = get_peft_model_state_dict(
            self.module, state_dict=weights or self.parameters, save_embedding_layers=False
        )
        tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in state.items()}
        write_atomically(
            directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"})
        )
        config = self.module.peft_config[_NAME].to_dict()
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
        write_atomically(directory / "adapter_config.json", text.encode())

    def _forward(self, layer: Any, x: Tensor) -> Tensor:
        """base(x) + scaling * B A x of one layer."""
        out: Tensor = layer.base_layer(x)
        if not self._active:
            return out
        dropped = layer.lora_dropout[_NAME](x)
        weight_A = layer.lora_A[_NAME].weight.to(out.dtype)
        weight_B = (layer.lora_B[_NAME].weight * layer.scaling[_NAME]).to(out.dtype)
        h_NR = linear(dropped.to(out.dtype), weight_A).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), h_NR, weight_B.T).view_as(out)


def add_adapter(model: Any, recipe: Recipe, layers: Sequence[int]) -> Any:
    """`model` with a fresh LoRA adapter on the blocks `layers`, as a PEFT model.

    Raises:
        ConfigError: the recipe names modules that the model does not have.
    """
    linears = {
        n.rsplit(".", 1)[-1]: m
        for n, m in decoder_blocks(model).named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    names: Sequence[str] = sorted(linears)
    if recipe.lora.target_modules != "all-linear":
        names = recipe.lora.target_modules
    if missing := sorted(set(names) - set(linears)):
        raise ConfigError(
            f"lora.target_modules names {missing}, which {type(model).__name__} does not have; "
            f"expected some of {sorted(linears)}; correct the recipe"
        )
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=list(names),
        layers_to_transform=list(layers),
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(linears[name], Conv1D) for name in names),
    )
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=recipe.lora.b_init_std)
    return peft_model
