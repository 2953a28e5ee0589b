"""Packed attention against transformers' eager attention of each row by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from circuit_breakers.errors import ModelError
from circuit_breakers_training.adapter.packed_attention import ATTENTION_NAME
from circuit_breakers_training.adapter.packing import pack_lengths

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
LENGTHS = (5, 140, 17, 1, 160, 29)  # two need more than one chunk of queries
packed_attention: Any = AttentionInterface()[ATTENTION_NAME]


def module() -> Any:
    return SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, training=False, is_causal=True)


def inputs(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, num_tokens, WIDTH, generator=generator).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def eager(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    length = q.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    mask = torch.zeros(length, length).masked_fill(~seen, -torch.inf)
    out: Tensor = eager_attention_forward(module(), q, k, v, mask, scaling=0.3)[0]
    return out


@pytest.mark.parametrize("window", [None, 6, 4096])
@pytest.mark.parametrize("matmul_max_length", [512, 20, 0])
def test_rows_and_gradients_equal_eager_attention_of_each_row(
    window: int | None, matmul_max_length: int
) -> None:
    layout, starts = pack_lengths(LENGTHS, torch.device("cpu"), matmul_max_length=matmul_max_length)
    total = sum(LENGTHS) + layout.num_fillers
    packed, apart = inputs(total), inputs(total)
    weight = torch.randn(1, total, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    out, probabilities = packed_attention(
        module(), *packed, None, scaling=0.3, sliding_window=window, packed_layout=layout
    )
    assert probabilities is None
    (out * weight).sum().backward()
    for start, length in zip(starts, LENGTHS, strict=True):
        row = slice(start, start + length)
        expected = eager(*(x[:, :, row] for x in apart), window)
        (expected * weight[:, row]).sum().backward()
        # float32 sums in another order.
        torch.testing.assert_close(out[:, row], expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed, apart, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_without_a_layout_rows_lie_side_by_side() -> None:
    q, k, v = (torch.cat([x, x.flip(2)]) for x in inputs(12))
    out, _ = packed_attention(module(), q, k, v, None, scaling=0.3)
    torch.testing.assert_close(out, eager(q, k, v, None), rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    layout, _ = pack_lengths(LENGTHS, torch.device("cpu"))
    q, k, v = (x.bfloat16() for x in inputs(sum(LENGTHS) + layout.num_fillers))
    # Rotary embeddings under autocast give float32 queries.
    out, _ = packed_attention(module(), q.float(), k, v, None, packed_layout=layout)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}, {"dropout": 0.1}, {"position_bias": 1}],
)
def test_anything_but_causal_attention_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected causal attention"):
        packed_attention(module(), *inputs(4), None, **options)


def test_attention_that_looks_ahead_is_refused() -> None:
    both_ways = nn.Module()
    both_ways.is_causal = False  # type: ignore[assignment]
    with pytest.raises(ModelError, match="two-way"):
        packed_attention(both_ways, *inputs(4), None)
