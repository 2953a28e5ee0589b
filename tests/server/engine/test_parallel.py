"""Several ranks or engines, two at a time on a CPU: the scores are those of transformers."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine import launch
from circuit_breakers.engine.launch import EngineSettings, engine_arguments, guarded_engine
from circuit_breakers.models import ResolvedModel

from ...vllm_release import needs_vllm_0_32
from . import tiny

# What vLLM's clients leave open when they are shut down is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMPTS = [[10 + (i * 7 + j) % 300 for j in range(length)] for i, length in enumerate((5, 60, 90))]


@pytest.fixture(autouse=True)
def leftovers_end_here() -> Iterator[None]:
    """Collected in the test that made them, not in whichever comes next."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ResolvedModel, Breaker]]:
    root: Path = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIRCUIT_BREAKERS_CACHE", str(root / "cache"))
        # Two workers share the cores of one node.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        model = tiny.write_llama(root / "model")
        # Blocks 1 and 4 are on different stages of two, and one probe reads both.
        yield model, tiny.write_tiny_breaker(root / "breaker", model)


def check(completion: Any, prompt: list[int], oracle: tiny.Oracle) -> None:
    token_ids = [*prompt, *completion.token_ids]
    assert completion.guard.num_tokens == len(token_ids), "each position exactly once"
    assert np.abs(completion.guard.logit_TP - oracle(token_ids)).max() < tiny.TOLERANCE


@pytest.mark.parametrize("axis", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_score_like_one(
    parts: tuple[ResolvedModel, Breaker], axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    # The workers get this process's path, not pytest's way of importing tests.
    monkeypatch.syspath_prepend(Path(__file__).parent)
    model, breaker = parts
    llm = tiny.tiny_engine(model, breaker, worker_cls="stage_worker.StageWorker", **{axis: 2})
    try:
        digests = llm.collective_rpc("circuit_breaker_digest")
        assert digests == [breaker.digest] * 2
        sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    oracle = tiny.Oracle(model, breaker)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert len(output.outputs[0].token_ids) == 20
        check(output.outputs[0], prompt, oracle)


@needs_vllm_0_32
def test_data_parallel_engines_each_guard_their_requests(
    parts: tuple[ResolvedModel, Breaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model, breaker = parts
    settings = EngineSettings(
        dtype="float32", max_model_len=tiny.MAX_LEN, served_name="tiny", data_parallel_size=2
    )
    arguments = engine_arguments(settings, model, breaker) | {"skip_tokenizer_init": True}
    outputs, digests = asyncio.run(_generate(arguments, breaker))
    assert digests == [breaker.digest] * 2
    oracle = tiny.Oracle(model, breaker)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        check(output.outputs[0], prompt, oracle)


async def _generate(arguments: dict[str, Any], breaker: Breaker) -> tuple[list[Any], list[Any]]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        guarded = await guarded_engine(engine, breaker, "enforce", "merged", None)
        sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False)

        async def one(i: int, prompt: list[int]) -> Any:
            last = None
            async for output in guarded.generate({"prompt_token_ids": prompt}, sampling, str(i)):
                last = output
            return last

        outputs = await asyncio.gather(*(one(i, p) for i, p in enumerate(PROMPTS)))
        return list(outputs), await launch._digests(engine)
    finally:
        engine.shutdown()


def test_a_killed_rank_ends_every_request_without_a_token(
    parts: tuple[ResolvedModel, Breaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of two dies in the middle of a generation: an error, and nothing after it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    monkeypatch.syspath_prepend(Path(__file__).parent)
    model, breaker = parts
    llm = tiny.tiny_engine(
        model, breaker, worker_cls="stage_worker.StageWorker", tensor_parallel_size=2
    )
    try:
        pids = llm.collective_rpc("pid")
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=100,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = llm.llm_engine
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        delivered = 0
        while delivered < 20:
            delivered += sum(len(o.outputs[0].token_ids) for o in engine.step())
        os.kill(pids[1], signal.SIGKILL)
        late = []
        with pytest.raises(RuntimeError):
            for _ in range(200):
                late += [t for o in engine.step() for t in o.outputs[0].token_ids]
        # A step that was under way may have ended well; no more than that.
        assert len(late) <= len(PROMPTS)
    finally:
        llm.llm_engine.engine_core.shutdown()
