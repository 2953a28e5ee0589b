"""The decoder blocks of a Hugging Face model: find them, cut them off, read them, run them twice.

B rows, T tokens, D model width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from circuit_breakers.errors import ModelError

__all__ = [
    "BaseStream",
    "compile_blocks",
    "cut_blocks",
    "decoder_blocks",
    "record_outputs",
    "rerun_in_backward",
]


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
            outputs[index] = _hidden(output)

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class BaseStream:
    """The stream without the adapter, which moves up by one block whenever the adapted one has.

    A forward pass runs the adapted stream, through the model's own code. Below the first adapted
    block the streams are one; from there on each block is run again on the base stream, so that the
    two are compared block by block and no base state is kept for later.
    """

    def __init__(
        self,
        disabled: Callable[[], AbstractContextManager[None]],
        observe: Callable[[int, Tensor, Tensor], None],
    ) -> None:
        """
        Args:
            disabled: the adapter is off inside.
            observe: called with an observed layer and both streams' (B, T, D) output of it.
        """
        self._disabled = disabled
        self._observe = observe
        self.hidden_BTD: Tensor | None = None
        """Output of the block that was run last; None where the two streams are still one."""
        self._advancing = False

    @contextmanager
    def beside(
        self, blocks: Mapping[int, nn.Module], doubled: frozenset[int], observed: frozenset[int]
    ) -> Iterator[None]:
        """A forward pass inside runs both streams.

        Args:
            blocks: by layer.
            doubled: layers that are run once a stream.
            observed: layers whose outputs are compared.
        """
        handles = [
            block.register_forward_hook(
                partial(self._advance, layer, layer in doubled, layer in observed),
                with_kwargs=True,
            )
            for layer, block in blocks.items()
            if layer in doubled or layer in observed
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _advance(
        self,
        layer: int,
        doubled: bool,
        observed: bool,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if self._advancing:
            return
        adapted_BTD = _hidden(output)
        base_BTD = adapted_BTD.detach()
        if doubled:
            hidden_BTD = args[0] if self.hidden_BTD is None else self.hidden_BTD
            self._advancing = True
            with self._disabled():
                # With its other hooks, by which wrappers gather the weights of a sharded block.
                base_BTD = _hidden(block(hidden_BTD, *args[1:], **kwargs))
            self._advancing = False
            self.hidden_BTD = base_BTD
        if observed:
            self._observe(layer, adapted_BTD, base_BTD)


def rerun_in_backward(blocks: Sequence[nn.Module]) -> None:
    """Keep only each block's input for the backward pass, and run it again there; in place."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block on its first run, for any number of tokens; in place."""
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def _hidden(output: Any) -> Tensor:
    """A block's (B, T, D) output, which comes first where there is more."""
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTD
