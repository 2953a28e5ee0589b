"""How much memory a training step takes, estimated without weights.

The forward pass of a step is run on fake tensors, which have shapes and no memory, and what
autograd would keep for the backward pass is added up. Rows are taken to be of equal length and
masked; packed ones keep a tenth to a third less. Not counted: buffers that come and go inside an
operation, the allocator's slack, the process itself and a CUDA context.

B conversations, T tokens, D model width
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from circuit_breakers_training.adapter.base_model import drop_head
from circuit_breakers_training.adapter.lora import Adapter
from circuit_breakers_training.blocks import cut_blocks, decoder_blocks
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.recipes.skeleton import model_skeleton

__all__ = ["MemoryEstimate", "TrainingShape", "training_shape"]

_ADAPTER_BYTES = 4 * 4
"""Of one parameter: itself, its gradient and two moments, all float32."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight: 4 bits, a one-byte scale for each 64, and a float32 for each 256 of the scales."""


class MemoryEstimate(NamedTuple):
    """Bytes, of one process."""

    loading: int
    """The whole base model, before it is cut."""
    weights: int
    """What is kept of it: embeddings and blocks up to the deepest target."""
    adapter: int
    """Adapter weights, their gradients and AdamW's two moments."""
    activations: int
    """What the backward pass needs of the adapted stream, and the base stream's states."""

    @property
    def peak(self) -> int:
        return max(self.loading, self.weights + self.adapter + self.activations)


class TrainingShape(NamedTuple):
    """What a recipe makes of a model, as far as shapes say."""

    architecture: str
    num_layers: int
    hidden_size: int
    max_positions: int
    """Longest context in tokens."""
    num_base: int
    """Parameters of the base model."""
    num_trained: int
    """Parameters of the adapter."""
    modules: tuple[str, ...]
    """Names of the linear modules of a block that get an adapter."""
    memory: MemoryEstimate


def training_shape(recipe: Recipe, model_dir: Path, *, num_tokens: int) -> TrainingShape:
    """Sizes of a training of `recipe` on the model in `model_dir`, of which config.json is read.

    Args:
        num_tokens: length of the longest conversation; the memory is that of a batch of such.
    Raises:
        ModelError: the config cannot be read, or is not that of a decoder.
        ConfigError: layers or adapter modules do not exist in this model.
    """
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    model = model_skeleton(model_dir, dtype=dtype)
    config = model.config.get_text_config()
    blocks = decoder_blocks(model)
    num_layers, num_base = len(blocks), _count(model)
    max_positions = int(config.max_position_embeddings)
    targets, adapted = recipe.target_layers(num_layers), recipe.adapted_layers(num_layers)
    loading = _weight_bytes(model, blocks, recipe)
    cut_blocks(model, targets[-1] + 1)
    drop_head(model)
    # As training does: attention that keeps no matrix of all pairs of tokens, where it can be had.
    if model._supports_attention_backend and model._supports_flash_attn:
        model.set_attn_implementation("sdpa")
    weights = _weight_bytes(model, blocks, recipe)
    model.eval().requires_grad_(False)
    with torch.device("meta"):
        adapter = Adapter(model, recipe, adapted)
    adapter.set_dropout(True)
    num_trained = sum(p.numel() for p in adapter.parameters.values())
    modules = {n.rsplit(".", 1)[-1] for n, m in blocks.named_modules() if isinstance(m, LoraLayer)}
    memory = MemoryEstimate(
        loading=loading,
        weights=weights,
        adapter=_ADAPTER_BYTES * num_trained,
        activations=_activation_bytes(
            recipe,
            model,
            adapted,
            recorded=range(len(blocks)) if recipe.objective.retain_layers == "all" else targets,
            num_tokens=min(num_tokens, max_positions),
        ),
    )
    return TrainingShape(
        architecture=type(model).__name__,
        num_layers=num_layers,
        hidden_size=int(config.hidden_size),
        max_positions=max_positions,
        num_base=num_base,
        num_trained=num_trained,
        modules=tuple(sorted(modules)),
        memory=memory,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weight_bytes(model: nn.Module, blocks: nn.ModuleList, recipe: Recipe) -> int:
    size = 2 if recipe.precision == "bf16" else 4
    num_weights, num_quantized = _count(model), 0
    if recipe.quantization == "nf4":
        num_quantized = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    return round((num_weights - num_quantized) * size + num_quantized * _NF4_BYTES)


def _activation_bytes(
    recipe: Recipe,
    model: Any,
    adapted: Sequence[int],
    *,
    recorded: Sequence[int],
    num_tokens: int,
) -> int:
    """Bytes that are alive between the forward and the backward pass of the largest part."""
    blocks = decoder_blocks(model)
    num_rows = 2 * (recipe.micro_batch_size or recipe.batch_size)
    # Of all kinds of tensors without memory, only fake ones run a whole model.
    with FakeTensorMode():
        core = model.base_model
        weights = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in (*core.named_parameters(), *core.named_buffers())
        }
        ids_BT = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
        with _saved_bytes(blocks, weights.values()) as saved:
            output = functional_call(core, weights, (ids_BT,), {"use_cache": False})
        state_BTD = output[0]
    state_bytes = state_BTD.numel() * state_BTD.element_size()
    of_blocks = [saved[layer] for layer in adapted]
    kept = sum(of_blocks)
    if recipe.gradient_checkpointing:
        # The inputs of all blocks, and what one block keeps when it is run again.
        kept = len(of_blocks) * state_bytes + max(of_blocks)
    return kept + len(recorded) * state_bytes


@contextmanager
def _saved_bytes(blocks: nn.ModuleList, weights: Iterable[Tensor]) -> Iterator[list[int]]:
    """Bytes that autograd keeps of each block's forward pass inside, besides the weights."""
    totals = [0] * len(blocks)
    # A tensor and its views are one piece of memory.
    seen = {weight.untyped_storage()._cdata for weight in weights}
    alive: list[Tensor] = []
    current: int | None = None

    def enter(index: int | None) -> Any:
        def hook(*_: Any) -> None:
            nonlocal current
            current = index

        return hook

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current is not None and storage._cdata not in seen:
            seen.add(storage._cdata)
            totals[current] += storage.nbytes()
            # The address of a freed piece could be given out again.
            alive.append(tensor)
        return tensor

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(enter(index)).remove)
            stack.callback(block.register_forward_hook(enter(None)).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        yield totals
