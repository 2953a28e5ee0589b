"""Which conversations make a step, and how they become one tensor: packed, or padded.

A plan depends on nothing but lengths and seed. The position in it is the step number, so that a
resumed run goes on with the very conversations that the killed one would have used next.

B conversations, T tokens, N tokens of a packed stream, C counted tokens
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_breakers_training.adapter.packing import MATMUL_MAX_LENGTH, PackedLayout, pack_lengths
from circuit_breakers_training.recipes.config import Tokens
from circuit_breakers_training.render import Rendered

__all__ = [
    "PaddedRows",
    "StepRows",
    "TokenBatch",
    "counted_tokens",
    "pack_rows",
    "pad_rows",
    "padded_batch",
    "plan_steps",
]

# Steps whose conversations are drawn together and then sorted by length: the more, the less
# padding, and the less random the company of a conversation.
_STEPS_PER_DRAW = 8
# Lengths are rounded up, since CPU kernels are prepared anew for every new shape.
_LENGTH_MULTIPLE = 16


class StepRows(NamedTuple):
    """Indices into the rows of each kind."""

    retain: tuple[int, ...]
    harmful: tuple[int, ...]


class PaddedRows(NamedTuple):
    ids_BT: Tensor
    """int64, padded on the right: a causal model's real tokens never see what follows them."""
    mask_BT: Tensor
    """bool, the tokens that count; never padding."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows as a model takes them, and where their counted tokens are."""

    ids_BT: Tensor
    """int64; (1, N) when packed."""
    position_BT: Tensor | None
    """Position of each token in its row; None where that is its column."""
    layout: PackedLayout | None
    """How the packed stream divides into rows; None when padded."""
    counted_C: Tensor
    """int64 places of the counted tokens in ids_BT.flatten(), row after row as they were given."""


def plan_steps(
    retain_lengths: Sequence[int],
    harmful_lengths: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[StepRows, ...]:
    """The rows of every step; a step's retain and harmful rows have similar lengths.

    Each kind goes through its rows in random order, all of them before any comes again.
    """
    rng = random.Random(seed)  # noqa: S311  no secret; stable between versions
    retain = _shuffled_forever(len(retain_lengths), rng)
    harmful = _shuffled_forever(len(harmful_lengths), rng)
    plan: list[StepRows] = []
    while len(plan) < steps:
        draw = min(_STEPS_PER_DRAW, steps - len(plan))
        by_length = [
            sorted((next(rows) for _ in range(draw * batch_size)), key=lengths.__getitem__)
            for rows, lengths in ((retain, retain_lengths), (harmful, harmful_lengths))
        ]
        cuts = [slice(i * batch_size, (i + 1) * batch_size) for i in range(draw)]
        rng.shuffle(cuts)
        plan += [StepRows(tuple(by_length[0][cut]), tuple(by_length[1][cut])) for cut in cuts]
    return tuple(plan)


def pad_rows(rows: Sequence[Rendered], tokens: Sequence[Tokens]) -> PaddedRows:
    """Rows as one tensor, with the mask that each row's entry of `tokens` asks for."""
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    # Any id will do for padding: it is not attended to, not counted, not read.
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (row, kind) in enumerate(zip(rows, tokens, strict=True)):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        mask_BT[b, len(row.ids) - counted_tokens(row, kind) : len(row.ids)] = True
    return PaddedRows(ids_BT, mask_BT)


def counted_tokens(row: Rendered, tokens: Tokens) -> int:
    """How many of the row's tokens, always its last ones, enter a mean."""
    skipped = {"response": row.num_prompt_tokens, "last_turn": row.num_earlier_tokens, "all": 0}
    return len(row.ids) - skipped[tokens]


def padded_batch(
    rows: Sequence[Rendered], tokens: Sequence[Tokens], device: torch.device
) -> TokenBatch:
    """Rows one below the other, padded to the longest."""
    padded = pad_rows(rows, tokens)
    return TokenBatch(
        ids_BT=padded.ids_BT.to(device),
        position_BT=None,
        layout=None,
        counted_C=padded.mask_BT.flatten().nonzero()[:, 0].to(device),
    )


def pack_rows(
    rows: Sequence[Rendered],
    tokens: Sequence[Tokens],
    device: torch.device,
    *,
    matmul_max_length: int = MATMUL_MAX_LENGTH,
) -> TokenBatch:
    """Rows end to end in one stream, without padding."""
    packing = pack_lengths(
        [len(row.ids) for row in rows], device, matmul_max_length=matmul_max_length
    )
    num_tokens = sum(len(row.ids) for row in rows) + packing.layout.num_fillers
    ids_N = torch.zeros(num_tokens, dtype=torch.int64)
    position_N = torch.zeros(num_tokens, dtype=torch.int64)
    counted = []
    for row, kind, start in zip(rows, tokens, packing.starts, strict=True):
        end = start + len(row.ids)
        ids_N[start:end] = torch.tensor(row.ids)
        position_N[start:end] = torch.arange(len(row.ids))
        counted.append(torch.arange(end - counted_tokens(row, kind), end))
    return TokenBatch(
        ids_BT=ids_N[None].to(device),
        position_BT=position_N[None].to(device),
        layout=packing.layout,
        counted_C=torch.cat(counted).to(device),
    )


def _shuffled_forever(num_rows: int, rng: random.Random) -> Iterator[int]:
    assert num_rows > 0
    while True:
        order = list(range(num_rows))
        rng.shuffle(order)
        yield from order
