"""What the guard costs: one engine, the guard switched on and off between blocks of requests.

Two processes side by side differ by more than the guard does, so both arms run in one process, in
turn (A B B A ...), and each ratio compares neighbours. "plain" is vLLM with the probe hooks removed
and the scheduler side absent; delivered tokens are counted, not sampled ones.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.launch import EngineSettings, engine_arguments
from circuit_breakers.models import ResolvedModel

__all__ = ["BenchRow", "bench_serving"]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """Paired throughput of one batch size, in delivered output tokens per second."""

    batch: int
    plain: float
    """Median tokens/s without the guard."""
    guarded: float
    """Median tokens/s in observe mode: all of the guard's work, no trip to cut a request short."""
    ratio: float
    """Median of guarded / plain over the pairs."""
    ratio_min: float
    ratio_max: float
    num_pairs: int


def bench_serving(
    model: ResolvedModel,
    breaker: Breaker,
    *,
    batches: tuple[int, ...] = (1, 32),
    num_pairs: int = 8,
    prompt_tokens: int = 64,
    output_tokens: int = 128,
) -> list[BenchRow]:
    """Runs the benchmark in this process; one row a batch size."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    settings = EngineSettings(mode="observe", max_model_len=1024, served_name=model.name)
    arguments = engine_arguments(settings, model, breaker)
    # Without the prefix cache, every block does the same work.
    llm = LLM(**arguments, enable_prefix_caching=False, disable_log_stats=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    arms = _Arms(llm)
    rows = []
    try:
        for batch in batches:
            prompts = [
                {"prompt_token_ids": [100 + (7 * i + j) % 1000 for j in range(prompt_tokens)]}
                for i in range(batch)
            ]

            def block(guarded: bool, prompts: Any = prompts) -> float:
                arms.switch(guarded)
                started_s = time.perf_counter()
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                elapsed_s = time.perf_counter() - started_s
                return sum(len(o.outputs[0].token_ids) for o in outputs) / elapsed_s

            block(True)
            block(False)
            pairs = []
            for i in range(num_pairs):
                order = (True, False) if i % 2 else (False, True)
                speeds = {guarded: block(guarded) for guarded in order}
                pairs.append((speeds[True], speeds[False]))
            ratios = [guarded / plain for guarded, plain in pairs]
            rows.append(
                BenchRow(
                    batch=batch,
                    plain=statistics.median(p for _, p in pairs),
                    guarded=statistics.median(g for g, _ in pairs),
                    ratio=statistics.median(ratios),
                    ratio_min=min(ratios),
                    ratio_max=max(ratios),
                    num_pairs=num_pairs,
                )
            )
    finally:
        llm.llm_engine.engine_core.shutdown()
    return rows


class _Arms:
    """Takes the guard out of a live engine and puts it back."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._guard = self._scheduler._circuit_breakers

    def switch(self, guarded: bool) -> None:
        self._llm.collective_rpc("circuit_breaker_enable", args=(guarded,))
        self._scheduler._circuit_breakers = self._guard if guarded else None
