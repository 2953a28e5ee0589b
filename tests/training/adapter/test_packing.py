from __future__ import annotations

import random

import torch

from circuit_breakers_training.adapter.packing import pack_lengths

CPU = torch.device("cpu")


def test_every_token_has_one_place_and_only_fillers_are_added() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(40)]
    layout, starts = pack_lengths(lengths, CPU)
    places = sorted(
        p for n, start in zip(lengths, starts, strict=True) for p in range(start, start + n)
    )
    assert places == list(range(sum(lengths)))
    assert sum(bucket.num_tokens for bucket in layout.buckets) == sum(lengths)
    assert (sum(lengths) + layout.num_fillers) % 16 == 0  # the stream's length is a multiple of 16
    assert layout.num_fillers < 16


def test_rows_of_a_bucket_have_similar_lengths() -> None:
    layout, _ = pack_lengths([100, 10, 90, 12, 300, 11], CPU)
    # 300 alone; 100 and 90; 12, 11 and 10: nothing else is within a factor of 1.5.
    assert [(b.num_rows, b.num_tokens) for b in layout.buckets] == [(1, 300), (2, 190), (3, 33)]
    assert [b.length for b in layout.buckets] == [300, 112, 16]  # one length is left as it is


def test_bucket_pads_with_zeros_and_takes_the_padding_out_again() -> None:
    layout, starts = pack_lengths([3, 2], CPU)
    (bucket,) = layout.buckets
    x_nHD = torch.arange(1.0, 11.0).view(5, 1, 2)
    padded_BTHD = bucket.padded(x_nHD)
    assert padded_BTHD.shape == (2, 16, 1, 2)
    assert starts == (0, 3)
    assert torch.equal(padded_BTHD[0, :3], x_nHD[:3])
    assert torch.equal(padded_BTHD[1, :2], x_nHD[3:])
    assert padded_BTHD.sum() == x_nHD.sum()
    assert torch.equal(bucket.packed(padded_BTHD), x_nHD)


def test_rows_of_one_length_are_not_copied() -> None:
    layout, _ = pack_lengths([7, 7, 7], CPU)
    (bucket,) = layout.buckets
    assert bucket.slot_n is None
    x_nHD = torch.randn(21, 2, 4)
    assert bucket.padded(x_nHD).data_ptr() == x_nHD.data_ptr()
