"""A base model cut to what training needs, run as two streams: with its adapter off and on.

B rows, T tokens, C counted tokens, D model width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breakers_training.adapter.base_model import drop_head, load_base, use_packed_attention
from circuit_breakers_training.adapter.lora import Adapter
from circuit_breakers_training.adapter.packing import MATMUL_MAX_LENGTH
from circuit_breakers_training.batches import TokenBatch, pack_rows, padded_batch
from circuit_breakers_training.blocks import (
    BaseStream,
    compile_blocks,
    cut_blocks,
    decoder_blocks,
    rerun_in_backward,
)
from circuit_breakers_training.recipes.config import Recipe, Tokens
from circuit_breakers_training.render import Rendered

__all__ = ["Shortcuts", "Streams"]


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """Work that a step leaves out, without a difference to its losses.

    Each field names such work: True leaves it out, False does it all the same, to measure what it
    costs.
    """

    padding: bool = True
    """Rows are packed; else padded to the longest."""
    upper_blocks: bool = True
    """Blocks above the deepest target are dropped."""
    lower_blocks_twice: bool = True
    """Blocks below the first adapted one are run once for both streams."""
    head: bool = True
    """The language-model head is dropped; else run on both streams."""
    fused_attention: bool = True
    """Rows up to a length are attended to by plain matrix products on a CPU."""
    float32_weights: bool = True
    """In precision bf16 the base weights are bfloat16; else float32, cast at every use."""


ALL_SHORTCUTS = Shortcuts()


class Streams:
    """The cut model with a fresh LoRA adapter on the blocks that the recipe names."""

    def __init__(
        self,
        recipe: Recipe,
        model_dir: Path,
        device: torch.device,
        *,
        shortcuts: Shortcuts = ALL_SHORTCUTS,
    ) -> None:
        """Load the model in the recipe's precision and add the adapter, seeded by the recipe.

        Raises:
            ModelError: the directory holds no decoder that can be loaded.
            ConfigError: layers or adapter modules do not exist in this model, or it cannot be
                quantized here.
        """
        self.device = device
        self._shortcuts = shortcuts
        small = recipe.precision == "bf16" and shortcuts.float32_weights
        self._autocast = recipe.precision == "bf16" and not small
        model = load_base(recipe, model_dir, device, torch.bfloat16 if small else torch.float32)
        blocks = decoder_blocks(model)
        self.targets = recipe.target_layers(len(blocks))
        self.adapted = adapted = recipe.adapted_layers(len(blocks))
        if shortcuts.upper_blocks:
            cut_blocks(model, self.targets[-1] + 1)
        if shortcuts.head:
            drop_head(model)
        self.packed = use_packed_attention(model) and shortcuts.padding
        """Rows are run end to end, without padding."""
        self._adapter = Adapter(model, recipe, adapted)
        self._model = model
        self._blocks = dict(enumerate(blocks))
        first_doubled = adapted[0] if shortcuts.lower_blocks_twice else 0
        self._doubled = frozenset(range(first_doubled, len(blocks)))
        self.layers = self.targets
        if recipe.objective.retain_layers == "all":
            self.layers = tuple(range(self.targets[-1] + 1))
        if recipe.compile:
            compile_blocks(list(blocks))
        if recipe.gradient_checkpointing:
            rerun_in_backward([blocks[layer] for layer in adapted])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, float32."""
        return self._adapter.parameters

    @property
    def module(self) -> nn.Module:
        """Everything with parameters, for wrappers that shard or synchronise them."""
        module: nn.Module = self._adapter.module
        return module

    @property
    def block_class_names(self) -> tuple[str, ...]:
        """Class names of the decoder blocks, the natural unit of sharding."""
        return tuple(sorted({type(block).__name__ for block in self._blocks.values()}))

    def set_dropout(self, active: bool) -> None:
        """Switch the adapter's dropout for the passes to come."""
        self._adapter.set_dropout(active)

    def batch(self, rows: Sequence[Rendered], tokens: Sequence[Tokens]) -> TokenBatch:
        """Rows as `compare` takes them, packed or padded, on the device."""
        if not self.packed:
            return padded_batch(rows, tokens, self.device)
        limit = MATMUL_MAX_LENGTH if self._shortcuts.fused_attention else 0
        return pack_rows(rows, tokens, self.device, matmul_max_length=limit)

    def compare(
        self,
        batch: TokenBatch,
        observe: Callable[[int, Tensor, Tensor], None],
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Run both streams; only the adapted one carries gradients.

        Args:
            observe: called at each of `layers`, ascending, with the layer and the (C, D) adapted
                and base states of the counted tokens, in the batch's order.
            layers: those of the losses unless given.
        """

        def counted(layer: int, adapted_BTD: Tensor, base_BTD: Tensor) -> None:
            adapted_CD, base_CD = (
                x.flatten(0, 1).index_select(0, batch.counted_C) for x in (adapted_BTD, base_BTD)
            )
            observe(layer, adapted_CD, base_CD)

        arguments: dict[str, Any] = {}
        if batch.layout is not None:
            arguments = {"position_ids": batch.position_BT, "packed_layout": batch.layout}
        self._run(batch.ids_BT, counted, arguments, self.layers if layers is None else layers)

    def save_adapter(
        self, directory: Path, *, base_name: str, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the adapter as plain PEFT: adapter_config.json and bfloat16 safetensors.

        Args:
            weights: whole parameters by name, where this process holds shards of them only.
        """
        self._adapter.save(directory, base_name=base_name, weights=weights)

    def _run(
        self,
        ids_BT: Tensor,
        observe: Callable[[int, Tensor, Tensor], None],
        arguments: dict[str, Any],
        layers: Sequence[int],
    ) -> None:
        base = BaseStream(self._adapter.disabled, observe)
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast:
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast, base.beside(self._blocks, self._doubled, frozenset(layers)):
            out = self._model.base_model(ids_BT, use_cache=False, **arguments)
            if not self._shortcuts.head:
                head = self._model.get_output_embeddings()
                head(out.last_hidden_state)
                with torch.no_grad():
                    head(base.hidden_BTD)
