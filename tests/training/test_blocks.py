from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuit_breakers_training.blocks import (
    BaseStream,
    compile_blocks,
    cut_blocks,
    decoder_blocks,
    record_outputs,
)

from .architectures import PACKED


@pytest.mark.parametrize("architecture", PACKED)
def test_blocks_are_found_cut_and_read(architecture: str) -> None:
    model: Any = PACKED[architecture]().eval()
    assert len(decoder_blocks(model)) == 4
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        cut_blocks(model, 3)
        assert len(decoder_blocks(model)) == 3
        with record_outputs(decoder_blocks(model)) as outputs:
            model.base_model(ids)
    for found, state in zip(outputs, expected[1:4], strict=True):
        torch.testing.assert_close(found, state)


class Adds(nn.Module):
    """Adds 1, and 10 more while the adapter is on."""

    active = True

    def forward(self, hidden: Tensor, *, times: int) -> tuple[Tensor, None]:
        return hidden + times * (11 if self.active else 1), None


def test_streams_part_at_the_first_doubled_block() -> None:
    blocks = [Adds(), Adds(), Adds()]
    blocks[0].active = False
    seen: list[tuple[int, float, float]] = []

    class Disabled(nullcontext[None]):
        def __enter__(self) -> None:
            for block in blocks:
                block.active = False

        def __exit__(self, *_: object) -> None:
            blocks[1].active = blocks[2].active = True

    stream = BaseStream(Disabled, lambda layer, x, y: seen.append((layer, x.item(), y.item())))
    with stream.beside(dict(enumerate(blocks)), frozenset({1, 2}), frozenset({0, 2})):
        hidden = torch.zeros(1, 1, 1)
        for block in blocks:
            hidden, _ = block(hidden, times=2)
    # 2, then 2 + 22 and 2 + 2, then 24 + 22 and 4 + 2.
    assert seen == [(0, 2.0, 2.0), (2, 46.0, 6.0)]
    assert not any(block._forward_hooks for block in blocks)


def test_compiled_blocks_compute_the_same_for_any_number_of_tokens() -> None:
    # The smallest block: a compiler of C++ takes minutes for a real one.
    block = nn.Linear(4, 4)
    inputs = [torch.randn(1, n, 4) for n in (3, 5)]
    expected = [block(x) for x in inputs]
    compile_blocks([block])
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(block(x), y)
