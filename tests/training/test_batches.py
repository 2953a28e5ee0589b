from __future__ import annotations

import torch

from circuit_breakers_training.batches import (
    counted_tokens,
    pack_rows,
    pad_rows,
    padded_batch,
    plan_steps,
)
from circuit_breakers_training.recipes.config import Tokens
from circuit_breakers_training.render import Rendered

from .architectures import random_rows

CPU = torch.device("cpu")


def test_plan_uses_every_row_before_any_comes_again() -> None:
    plan = plan_steps(range(1, 41), range(1, 21), steps=20, batch_size=4, seed=3)
    assert len(plan) == 20
    retain = [i for step in plan for i in step.retain]
    harmful = [i for step in plan for i in step.harmful]
    # 80 draws of 40 rows and of 20 rows.
    assert all(retain.count(i) == 2 for i in range(40))
    assert all(harmful.count(i) == 4 for i in range(20))
    again = plan_steps(range(1, 41), range(1, 21), steps=20, batch_size=4, seed=3)
    assert plan == again
    assert plan != plan_steps(range(1, 41), range(1, 21), steps=20, batch_size=4, seed=4)


def test_mask_covers_response_last_turn_or_everything_but_never_padding() -> None:
    row = Rendered(ids=(5, 6, 7, 8), num_prompt_tokens=3, num_earlier_tokens=2)
    kinds: list[Tokens] = ["response", "last_turn", "all"]
    padded = pad_rows([row] * 3, kinds)
    assert padded.ids_BT.shape == (3, 16)  # widths are multiples of 16
    counted = [[0, 3], [1, 2], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert padded.mask_BT.nonzero().tolist() == counted
    assert [counted_tokens(row, kind) for kind in kinds] == [1, 2, 4]


def test_packed_and_padded_batches_count_the_same_tokens_in_the_same_order() -> None:
    rows = random_rows(9, seed=0)
    kinds: list[Tokens] = ["all", "response", "all"] * 3
    packed, padded = pack_rows(rows, kinds, CPU), padded_batch(rows, kinds, CPU)
    expected = [
        token
        for row, kind in zip(rows, kinds, strict=True)
        for token in row.ids[row.num_prompt_tokens if kind == "response" else 0 :]
    ]
    for batch in (packed, padded):
        assert batch.ids_BT.flatten()[batch.counted_C].tolist() == expected
    assert packed.ids_BT.numel() < sum(len(row.ids) for row in rows) + 16
    assert packed.ids_BT.numel() < padded.ids_BT.numel()


def test_positions_begin_anew_with_every_row() -> None:
    rows = random_rows(5, seed=1)
    batch = pack_rows(rows, ["all"] * 5, CPU)
    assert batch.position_BT is not None
    positions = batch.position_BT.flatten()[batch.counted_C].tolist()
    assert positions == [i for row in rows for i in range(len(row.ids))]
