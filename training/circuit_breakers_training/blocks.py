"""The decoder blocks of a Hugging Face model: find them, cut them off, read and reuse their output.

B conversations, T tokens, D model width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breakers.errors import ModelError

__all__ = ["SharedBlock", "cut_blocks", "decoder_blocks", "record_outputs", "share_blocks"]


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model.

    Raises:
        ModelError: no list, or more than one, is as long as the model is deep.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    core = model.base_model
    found = [m for m in core.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of {num_layers} decoder blocks, "
            "expected exactly one; use a decoder-only architecture such as Llama, Qwen, Mistral, "
            "Gemma or GPT-2"
        )
    return found[0]


def cut_blocks(model: Any, num_blocks: int) -> None:
    """Drop every block from `num_blocks` on, in place, for both memory and time."""
    blocks = decoder_blocks(model)
    assert 0 < num_blocks <= len(blocks)
    del blocks[num_blocks:]
    model.config.get_text_config().num_hidden_layers = num_blocks


@contextmanager
def record_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The (B, T, D) output of each block, in order, once a forward pass has run inside."""
    outputs: list[Tensor] = [torch.empty(0)] * len(blocks)

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class SharedBlock(nn.Module):
    """A block without an adapter: run in the base pass, replayed in the adapted pass.

    Both passes have the same input up to the first adapted block, so they agree there exactly.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.replay = False
        self._output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.replay:
            self._output = self.block(*args, **kwargs)
        return self._output

    def __getattr__(self, name: str) -> Any:
        # Models read facts of a block before they call it, such as its attention type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def share_blocks(blocks: nn.ModuleList, num_blocks: int) -> tuple[SharedBlock, ...]:
    """Replace the first `num_blocks` blocks by shared ones, in place."""
    shared = tuple(SharedBlock(block) for block in blocks[:num_blocks])
    for index, block in enumerate(shared):
        blocks[index] = block
    return shared
