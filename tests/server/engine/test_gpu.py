"""What only a GPU can run: CUDA graphs, sleep mode, several devices. By transformers' scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuit_breakers.artifact import Breaker
from circuit_breakers.models import ResolvedModel

from . import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[10 + (i * 7 + j) % 300 for j in range(length)] for i, length in enumerate((5, 60, 90))]
TOLERANCE = 0.15
"""Absolute. A GPU runs these in bfloat16: 8 bits leave about a percent of logits of 1 to 3."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ResolvedModel, Breaker]]:
    root: Path = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIRCUIT_BREAKERS_CACHE", str(root / "cache"))
        model = tiny.write_llama(root / "model")
        yield model, tiny.write_tiny_breaker(root / "breaker", model)


def check_scores(llm: Any, oracle: tiny.Oracle) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        completion = output.outputs[0]
        token_ids = [*prompt, *completion.token_ids]
        assert len(completion.token_ids) == 40
        assert completion.guard.num_tokens == len(token_ids), "each position exactly once"
        assert np.abs(completion.guard.logit_TP - oracle(token_ids)).max() < TOLERANCE


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled-with-cuda-graphs"])
def test_scores_are_those_of_transformers(
    parts: tuple[ResolvedModel, Breaker], eager: bool
) -> None:
    llm = tiny.tiny_engine(*parts, dtype="bfloat16", enforce_eager=eager)
    try:
        check_scores(llm, tiny.Oracle(*parts))
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("level", [1, 2])
def test_probes_outlive_a_sleep(parts: tuple[ResolvedModel, Breaker], level: int) -> None:
    llm = tiny.tiny_engine(*parts, dtype="bfloat16", enable_sleep_mode=True)
    try:
        llm.sleep(level=level)
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
        check_scores(llm, tiny.Oracle(*parts))
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("axis", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_devices_score_like_one(parts: tuple[ResolvedModel, Breaker], axis: str) -> None:
    llm = tiny.tiny_engine(*parts, dtype="bfloat16", **{axis: 2})
    try:
        check_scores(llm, tiny.Oracle(*parts))
    finally:
        llm.llm_engine.engine_core.shutdown()
