"""Columns of the score buffer and their sums, on blocks that are a few numbers each.

The real engine is in test_parity.py and test_parallel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from circuit_breakers.artifact import Breaker, ProbeSpec, ProbeWeights
from circuit_breakers.artifact.manifest import (
    Aggregation,
    BaseModelSpec,
    Canary,
    Manifest,
    Message,
)
from circuit_breakers.engine.probes import PendingRows, ProbeColumns, WorkerProbes

from .conftest import CALIBRATION

WIDTH = 8
NUM_LAYERS = 7
STREAM = np.random.default_rng(0).normal(size=(NUM_LAYERS, 5, WIDTH)).astype(np.float32)
"""What each block puts out for five tokens."""


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    # Registers the op, once a process, as every process of vLLM does.
    from vllm.plugins import load_general_plugins

    load_general_plugins()


class Block(nn.Module):
    """Puts out its part of STREAM, in two parts as vLLM's fused blocks do."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.stream_ND = torch.from_numpy(STREAM[layer])

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.25 * self.stream_ND, 0.75 * self.stream_ND


def model(blocks: Sequence[nn.Module] | None = None) -> Any:
    blocks = blocks or [Block(layer) for layer in range(NUM_LAYERS)]
    return SimpleNamespace(model=SimpleNamespace(layers=nn.ModuleList(blocks)))


def specs(*layers: tuple[int, ...]) -> list[ProbeSpec]:
    return [
        ProbeSpec(
            name=f"probe{i}",
            layer=read[0] if len(read) == 1 else None,
            layers=read if len(read) > 1 else None,
            aggregation=Aggregation(kind="max"),
            threshold_logit=1e9,
            calibration=CALIBRATION,
        )
        for i, read in enumerate(layers)
    ]


def breaker(*layers: tuple[int, ...]) -> Breaker:
    rng = np.random.default_rng(1)
    probes = specs(*layers)
    manifest = Manifest(
        schema_version=1,
        name="test",
        base_model=BaseModelSpec(
            id="m",
            revision=None,
            config_sha256="0" * 64,
            num_layers=NUM_LAYERS + 1,
            hidden_size=WIDTH,
        ),
        created=datetime(2026, 11, 24, tzinfo=UTC),
        recipe={},
        data_sha256={},
        probes=tuple(probes),
        canaries=tuple(
            Canary(messages=(Message(role="user", content="x"),), label=label)
            for label in ("harmful", "benign")
        ),
        files={},
    )
    weights = {}
    for i, read in enumerate(layers):
        shape = (WIDTH,) if len(read) == 1 else (len(read), WIDTH)
        weights[f"probe{i}"] = ProbeWeights(rng.normal(size=shape).astype(np.float32), i + 0.5)
    return Breaker(path=Path("none"), manifest=manifest, digest="0" * 64, weights=weights)


def expected(of: Breaker) -> np.ndarray:
    """float64 (N, P), by the definition of a probe."""
    columns = []
    for spec in of.manifest.probes:
        weights = of.weights[spec.name]
        parts = [
            STREAM[layer].astype(np.float64) @ weight_D
            for layer, weight_D in zip(spec.read_layers, weights.weight_LD, strict=True)
        ]
        columns.append(sum(parts) + weights.bias)
    return np.stack(columns, axis=1)


def run(probes: WorkerProbes, blocks: Any, num_rows: int = 5) -> np.ndarray:
    probes.begin_step(num_rows)
    for block in blocks:
        block()
    return probes.take_rows().get()


LAYERS = ((5,), (0, 3), (3,), (0, 1, 5), (0,))
SIXTEEN = tuple((i % 6, 6) if i % 3 == 0 else (i % 7,) for i in range(16))


@pytest.mark.parametrize("layers", [((4,),), ((2, 4),), LAYERS, SIXTEEN])
def test_a_logit_is_the_sum_over_the_layers(layers: tuple[tuple[int, ...], ...]) -> None:
    of, on = breaker(*layers), model()
    logit_NP = run(WorkerProbes(of, on, 9, "cpu"), on.model.layers)
    assert logit_NP.dtype == np.float32
    # Sums of at most 24 products of size 1; float32 rounds each by 6e-8.
    np.testing.assert_allclose(logit_NP, expected(of), atol=2e-5)


def test_a_layer_that_was_not_run_leaves_its_probes_unscored() -> None:
    of, on = breaker(*LAYERS), model()
    blocks = [block for layer, block in enumerate(on.model.layers) if layer != 3]
    logit_NP = run(WorkerProbes(of, on, 9, "cpu"), blocks)
    assert np.isnan(logit_NP).all(axis=0).tolist() == [False, True, True, False, False]
    assert np.isfinite(logit_NP[:, [0, 3, 4]]).all()


def test_rows_of_an_earlier_step_are_gone() -> None:
    on = model()
    probes = WorkerProbes(breaker(*LAYERS), on, 9, "cpu")
    run(probes, on.model.layers)
    assert np.isnan(run(probes, [], num_rows=3)).all()


def test_stages_hand_on_parts_of_one_probe() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    of = breaker(*LAYERS)
    whole = [Block(layer) for layer in range(NUM_LAYERS)]
    first = WorkerProbes(of, model([*whole[:2], *(PPMissingLayer() for _ in whole[2:])]), 9, "cpu")
    last = WorkerProbes(of, model([*(PPMissingLayer() for _ in whole[:2]), *whole[2:]]), 9, "cpu")
    first.begin_step(5)
    for block in whole[:2]:
        block()
    handed_on = first.hand_on()
    # Probe 1 reads blocks 0 and 3: half of it has come, so it has no logit yet.
    assert np.isnan(first.take_rows().get()[:, 1]).all()
    last.begin_step(5, handed_on)
    for block in whole[2:]:
        block()
    np.testing.assert_allclose(last.take_rows().get(), expected(of), atol=2e-5)


def test_parts_are_added_from_the_lowest_layer_up() -> None:
    columns = ProbeColumns(specs((1, 2, 3)))
    # In float32, 1 vanishes beside 1e8: (1 + 1e8) - 1e8 is 0, and 1 + (1e8 - 1e8) would be 1.
    part_NC = np.array([[1, 1e8, -1e8]], np.float32)
    assert columns.to_logits(part_NC).tolist() == [[0.0]]


def test_infinities_that_cancel_are_no_score() -> None:
    part_NC = np.array([[np.inf, -np.inf], [1.0, 2.0]], np.float32)
    logit_NP = PendingRows(part_NC, ProbeColumns(specs((1, 2)))).get()
    assert np.isnan(logit_NP[0, 0])
    assert logit_NP[1, 0] == 3.0


def test_probes_of_one_layer_each_are_only_put_in_order() -> None:
    columns = ProbeColumns(specs((4,), (1,), (4,)))
    assert columns.num_columns == 3
    # Columns by layer: 1, then 4 twice.
    part_NC = np.array([[10.0, 20.0, 30.0]], np.float32)
    assert columns.to_logits(part_NC).tolist() == [[20.0, 10.0, 30.0]]
