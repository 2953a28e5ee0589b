"""Attention over packed rows: a stream of tokens outside, rows of similar length inside.

Norms, projections and MLPs treat every token by itself, so the rows of a batch lie end to end in
one stream and no padding is computed. Attention alone has to know where a row begins: it takes the
stream apart into buckets of rows of similar length. It is registered with transformers' attention
interface, so the models' own code runs as it is; the layout travels as a keyword argument, which
every model of that interface hands down to its attention.

N tokens of the stream, n tokens of one bucket, B its rows, T its longest row, H heads of queries,
K heads of keys and values, D head width, X = B * K, S = T * H / K
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from circuit_breakers.errors import ModelError
from circuit_breakers_training.adapter.packing import Bucket, PackedLayout

__all__ = ["ATTENTION_NAME"]

ATTENTION_NAME = "circuit_breakers_packed"
"""The implementation's name in transformers' attention interface."""

_TOKENS_AT_ONCE = 128
"""Queries that are multiplied together, with the keys up to the last of them alone: half of a
causal score matrix is never looked at."""
_WITHOUT_EFFECT = frozenset({"cache_position", "output_attentions", "position_ids", "use_cache"})
"""What models hand down besides, and no attention function reads."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows, as transformers calls it.

    Args:
        query: (1, H, N, D) with a layout; without one (B, H, T, D), all rows of T tokens.
        key: the same with K heads.
        value: like `key`.
        attention_mask: none is ever made for an implementation that has no mask function.
        packed_layout: how the stream divides into rows.
    Returns:
        (1, N, H, D) or (B, T, H, D), and no probabilities.
    Raises:
        ModelError: the model asks for more than causal attention with a sliding window.
    """
    unknown = sorted(n for n, v in options.items() if v is not None and n not in _WITHOUT_EFFECT)
    if unknown or attention_mask is not None or dropout or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} asks for {unknown or 'a mask, dropout or two-way attention'}"
            ", expected causal attention with at most a sliding window; run this model's rows "
            "padded"
        )
    num_rows, num_heads, num_tokens, width = query.shape
    if packed_layout is None:
        uniform = Bucket(
            num_tokens=num_rows * num_tokens, num_rows=num_rows, length=num_tokens, slot_n=None
        )
        packed_layout = PackedLayout(buckets=(uniform,))
    scaling = width**-0.5 if scaling is None else scaling
    sizes = [bucket.num_tokens for bucket in packed_layout.buckets]
    sizes += [packed_layout.num_fillers] * bool(packed_layout.num_fillers)
    parts = zip(
        *(
            # Under autocast rotary embeddings are float32 and values are not.
            x.to(value.dtype).transpose(1, 2).reshape(-1, x.shape[1], width).split(sizes)
            for x in (query, key, value)
        ),
        strict=True,
    )
    out_nHD = []
    for bucket, (q_nHD, k_nKD, v_nKD) in zip(packed_layout.buckets, parts, strict=False):
        window = sliding_window if sliding_window and sliding_window < bucket.length else None
        on_cpu = query.device.type == "cpu"
        if on_cpu and bucket.length <= packed_layout.matmul_max_length:
            groups = num_heads // key.shape[1]
            mask_ST = _mask(bucket.length, window, groups, value.dtype)
            out_nHD.append(_MatmulAttention.apply(q_nHD, k_nKD, v_nKD, bucket, mask_ST, scaling))
        else:
            out_nHD.append(_fused(q_nHD, k_nKD, v_nKD, bucket, window, scaling))
    if packed_layout.num_fillers:
        out_nHD.append(value.new_zeros(packed_layout.num_fillers, num_heads, width))
    out_NHD = torch.cat(out_nHD) if len(out_nHD) > 1 else out_nHD[0]
    return out_NHD.view(num_rows, num_tokens, num_heads, width), None


class _MatmulAttention(torch.autograd.Function):
    """Attention of one bucket by batched matrix products.

    Keeps queries, keys and values for the backward pass, without padding, and computes the
    probabilities again there: they would be as large as all the rest of the block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_nHD: Tensor,
        k_nKD: Tensor,
        v_nKD: Tensor,
        bucket: Bucket,
        mask_ST: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(q_nHD, k_nKD, v_nKD)
        ctx.constants = bucket, mask_ST, scaling
        q_XSD, k_XTD, v_XTD = (_by_head(x, bucket, k_nKD.shape[1]) for x in (q_nHD, k_nKD, v_nKD))
        out_XSD = [
            torch.bmm(_probabilities(q_XSD[:, s], k_XTD[:, t], mask_ST[s, t], scaling), v_XTD[:, t])
            for s, t in _chunks(q_XSD.shape[1], bucket.length)
        ]
        return _by_token(torch.cat(out_XSD, dim=1), bucket, q_nHD.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_nHD, k_nKD, v_nKD = ctx.saved_tensors
        bucket, mask_ST, scaling = ctx.constants
        num_heads, num_kv = q_nHD.shape[1], k_nKD.shape[1]
        q_XSD, k_XTD, v_XTD, g_XSD = (
            _by_head(x, bucket, num_kv) for x in (q_nHD, k_nKD, v_nKD, gradients[0])
        )
        dq_XSD = torch.empty_like(q_XSD)
        dk_XTD, dv_XTD = torch.zeros_like(k_XTD), torch.zeros_like(v_XTD)
        for s, t in _chunks(q_XSD.shape[1], bucket.length):
            p_XST = _probabilities(q_XSD[:, s], k_XTD[:, t], mask_ST[s, t], scaling)
            dp_XST = torch.bmm(g_XSD[:, s], v_XTD[:, t].mT)
            ds_XST = torch.ops.aten._softmax_backward_data(dp_XST, p_XST, -1, p_XST.dtype)
            dq_XSD[:, s] = torch.bmm(ds_XST, k_XTD[:, t])
            dk_XTD[:, t] += torch.bmm(ds_XST.mT, q_XSD[:, s])
            dv_XTD[:, t] += torch.bmm(p_XST.mT, g_XSD[:, s])
        return (
            _by_token(dq_XSD.mul_(scaling), bucket, num_heads),
            _by_token(dk_XTD.mul_(scaling), bucket, num_kv),
            _by_token(dv_XTD, bucket, num_kv),
            None,
            None,
            None,
        )


def _probabilities(q_XSD: Tensor, k_XTD: Tensor, mask_ST: Tensor, scaling: float) -> Tensor:
    scores_XST = torch.baddbmm(mask_ST.expand(len(q_XSD), -1, -1), q_XSD, k_XTD.mT, alpha=scaling)
    return scores_XST.softmax(dim=-1)


def _chunks(num_queries: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Queries of a few tokens, of all heads in a group, and the keys that they may look at."""
    groups = num_queries // length
    for start in range(0, length, _TOKENS_AT_ONCE):
        end = min(start + _TOKENS_AT_ONCE, length)
        yield slice(start * groups, end * groups), slice(0, end)


def _by_head(x_nHD: Tensor, bucket: Bucket, num_kv: int) -> Tensor:
    """(X, S, D): the queries of all heads that share a head of keys become one matrix."""
    x_BTHD = bucket.padded(x_nHD)
    rows, length, heads, width = x_BTHD.shape
    grouped = x_BTHD.view(rows, length, num_kv, heads // num_kv, width).transpose(1, 2)
    return grouped.reshape(rows * num_kv, length * heads // num_kv, width)


def _by_token(x_XSD: Tensor, bucket: Bucket, num_heads: int) -> Tensor:
    """(n, H, D), the reverse of `_by_head`."""
    rows, length, width = bucket.num_rows, bucket.length, x_XSD.shape[-1]
    num_kv = len(x_XSD) // rows
    grouped = x_XSD.view(rows, num_kv, length, num_heads // num_kv, width).transpose(1, 2)
    return bucket.packed(grouped.reshape(rows, length, num_heads, width))


@lru_cache(maxsize=16)
def _mask(length: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """(S, T) to add to scores: 0 where a token may look, -inf elsewhere."""
    allowed_TT = _allowed(length, window, torch.device("cpu"))
    mask_TT = torch.zeros(length, length, dtype=dtype).masked_fill(~allowed_TT, -torch.inf)
    return mask_TT.repeat_interleave(groups, dim=0)


def _allowed(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool: a token sees itself and, of those before it, the last `window` - 1 or all."""
    allowed_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed_TT if window is None else allowed_TT.triu(1 - window)


def _fused(
    q_nHD: Tensor,
    k_nKD: Tensor,
    v_nKD: Tensor,
    bucket: Bucket,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention of one bucket by torch's fused kernel."""
    q_BHTD, k_BKTD, v_BKTD = (bucket.padded(x).transpose(1, 2) for x in (q_nHD, k_nKD, v_nKD))
    groups = q_BHTD.shape[1] // k_BKTD.shape[1]
    # Where a mask is given or on a CPU, the kernel that reads each key head for several query heads
    # is not the fused one.
    shared = groups > 1 and window is None and q_nHD.device.type != "cpu"
    if groups > 1 and not shared:
        k_BKTD, v_BKTD = (x.repeat_interleave(groups, dim=1) for x in (k_BKTD, v_BKTD))
    out_BHTD = scaled_dot_product_attention(
        q_BHTD,
        k_BKTD,
        v_BKTD,
        attn_mask=None if window is None else _allowed(bucket.length, window, q_nHD.device),
        is_causal=window is None,
        scale=scaling,
        enable_gqa=shared,
    )
    return bucket.packed(out_BHTD.transpose(1, 2))


AttentionInterface.register(ATTENTION_NAME, _attention)
