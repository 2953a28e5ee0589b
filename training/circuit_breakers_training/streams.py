"""A base model cut to what training needs, run twice: with its adapter off and on.

No block above the deepest target is kept and the language-model head never runs: neither loss
depends on them.

B conversations, T tokens, D model width
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers_training.blocks import (
    cut_blocks,
    decoder_blocks,
    record_outputs,
    share_blocks,
)
from circuit_breakers_training.checkpoint import write_atomically
from circuit_breakers_training.config import Recipe

__all__ = ["StreamStates", "Streams", "add_adapter"]


class StreamStates(NamedTuple):
    """Output of each recorded block, (B, T, D), in the order of `Streams.layers`."""

    adapted: list[Tensor]
    base: list[Tensor]


class Streams:
    """The cut model with a fresh LoRA adapter on the blocks that the recipe names."""

    def __init__(self, recipe: Recipe, model_dir: Path, device: torch.device) -> None:
        """Load the model in the recipe's precision and add the adapter, seeded by the recipe.

        Raises:
            ModelError: the directory holds no decoder that can be loaded.
            ConfigError: layers or adapter modules do not exist in this model.
        """
        self.device = device
        self._autocast = recipe.precision == "bf16"
        model = _load(model_dir, recipe).to(device)
        blocks = decoder_blocks(model)
        self.targets = recipe.target_layers(len(blocks))
        adapted = recipe.adapted_layers(len(blocks))
        cut_blocks(model, self.targets[-1] + 1)
        self._shared = share_blocks(blocks, adapted[0])
        # Dropout and other training behaviour of the base would make the two streams differ.
        model.eval()
        torch.manual_seed(recipe.seed)
        self._peft = add_adapter(model, recipe, adapted)
        self._core = model.base_model
        self._blocks = blocks
        self.layers = self.targets
        if recipe.objective.retain_layers == "all":
            self.layers = tuple(range(len(blocks)))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, float32."""
        return {n: p for n, p in self._peft.named_parameters() if p.requires_grad}

    def set_dropout(self, active: bool) -> None:
        """Switch the adapter's dropout for the passes to come."""
        for module in self._peft.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train(active)

    def forward(self, ids_BT: Tensor) -> StreamStates:
        """Run both streams over right-padded ids; only the adapted one carries gradients."""
        recorded = [self._blocks[layer] for layer in self.layers]
        ids_BT = ids_BT.to(self.device)
        with record_outputs(recorded) as base, torch.no_grad(), self._peft.disable_adapter():
            self._run(ids_BT, replay=False)
        with record_outputs(recorded) as adapted:
            self._run(ids_BT, replay=True)
        return StreamStates(adapted=adapted, base=base)

    def at_targets(self, states: StreamStates) -> StreamStates:
        """The target layers of `states`."""
        chosen = [self.layers.index(layer) for layer in self.targets]
        return StreamStates([states.adapted[i] for i in chosen], [states.base[i] for i in chosen])

    def _run(self, ids_BT: Tensor, *, replay: bool) -> None:
        for block in self._shared:
            block.replay = replay
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast:
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast:
            self._core(ids_BT, use_cache=False)

    def save_adapter(self, directory: Path, *, base_name: str) -> None:
        """Write the adapter as plain PEFT: adapter_config.json and bfloat16 safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        # Embeddings are never trained; asking PEFT to find out would look the base up on the hub.
        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in state.items()}
        write_atomically(
            directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"})
        )
        config = self._peft.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
        write_atomically(directory / "adapter_config.json", text.encode())


def _load(model_dir: Path, recipe: Recipe) -> Any:
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            # On CPUs the backward pass of fused attention is slower than plain matrix products
            # at the lengths that training uses.
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load {str(model_dir)!r}: {error}; expected a directory with config.json and "
            "safetensors weights of a causal language model; check the path"
        ) from error


def add_adapter(model: Any, recipe: Recipe, layers: Sequence[int]) -> Any:
    """`model` with a fresh LoRA adapter on the blocks `layers`, as a PEFT model.

    Raises:
        ConfigError: the recipe names modules that this model does not have.
    """
    linear = {
        n.rsplit(".", 1)[-1]: m
        for n, m in decoder_blocks(model).named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    names: Sequence[str] = sorted(linear)
    if recipe.lora.target_modules != "all-linear":
        names = recipe.lora.target_modules
    if missing := sorted(set(names) - set(linear)):
        raise ConfigError(
            f"lora.target_modules names {missing}, which {type(model).__name__} does not have; "
            f"expected some of {sorted(linear)}; correct the recipe"
        )
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=list(names),
        layers_to_transform=list(layers),
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in names),
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=recipe.lora.b_init_std)
    return peft_model
