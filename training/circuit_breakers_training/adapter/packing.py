"""Rows of a batch end to end in one stream of tokens, and back into buckets of similar length.

N tokens of the stream, n tokens of one bucket, B its rows, T its longest row, H heads, D head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MATMUL_MAX_LENGTH", "Bucket", "PackedLayout", "Packing", "pack_lengths"]

MATMUL_MAX_LENGTH = 512
"""Longest bucket whose attention is two plain matrix products on a CPU: up to here, the backward
pass of the fused kernel is several times slower."""

_LENGTH_RATIO = 1.5
"""Longest row of a bucket over its shortest, at most."""
_LENGTH_MULTIPLE = 16
"""Bucket lengths and the stream's are rounded up to it: CPU kernels are prepared anew for every new
shape."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Rows of similar length, end to end in the stream."""

    num_tokens: int
    num_rows: int
    length: int
    """Tokens that each row is padded to, for attention alone."""
    slot_n: Tensor | None
    """Place of each token among the padded rows; None where nothing is padded."""

    def padded(self, x_nHD: Tensor) -> Tensor:
        """(B, T, H, D), zero at padding."""
        shape = (self.num_rows, self.length, *x_nHD.shape[1:])
        if self.slot_n is None:
            return x_nHD.reshape(shape)
        flat = x_nHD.new_zeros(self.num_rows * self.length, *x_nHD.shape[1:])
        return flat.index_copy(0, self.slot_n, x_nHD).view(shape)

    def packed(self, x_BTHD: Tensor) -> Tensor:
        """(n, H, D), padding left out."""
        flat = x_BTHD.reshape(-1, *x_BTHD.shape[2:])
        return flat if self.slot_n is None else flat.index_select(0, self.slot_n)


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """How a stream divides into rows."""

    buckets: tuple[Bucket, ...]
    num_fillers: int = 0
    """Tokens at the end that belong to no row; nothing attends to them and nothing counts them."""
    matmul_max_length: int = MATMUL_MAX_LENGTH
    """Longest bucket that is computed by plain matrix products on a CPU."""


class Packing(NamedTuple):
    layout: PackedLayout
    starts: tuple[int, ...]
    """Place of each row's first token in the stream, in the order of the given lengths."""


def pack_lengths(
    lengths: Sequence[int],
    device: torch.device,
    *,
    matmul_max_length: int = MATMUL_MAX_LENGTH,
) -> Packing:
    """The layout of a stream of rows of these lengths, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    buckets: list[Bucket] = []
    starts = [0] * len(lengths)
    begin = offset = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        end = begin
        while end < len(order) and lengths[order[end]] * _LENGTH_RATIO >= longest:
            starts[order[end]] = offset
            offset += lengths[order[end]]
            end += 1
        buckets.append(_bucket([lengths[i] for i in order[begin:end]], device))
        begin = end
    layout = PackedLayout(
        buckets=tuple(buckets),
        num_fillers=-offset % _LENGTH_MULTIPLE,
        matmul_max_length=matmul_max_length,
    )
    return Packing(layout, tuple(starts))


def _bucket(lengths: Sequence[int], device: torch.device) -> Bucket:
    length = -(-lengths[0] // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    if len(set(lengths)) == 1:
        length = lengths[0]
    slot_n = None
    if any(n != length for n in lengths):
        slot_n = torch.cat([torch.arange(n) + b * length for b, n in enumerate(lengths)]).to(device)
    return Bucket(num_tokens=sum(lengths), num_rows=len(lengths), length=length, slot_n=slot_n)
