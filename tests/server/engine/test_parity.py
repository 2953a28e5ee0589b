"""Scores from inside vLLM equal a transformers forward over the same tokens, position by position.

One probe reads one layer, the other two. Tolerance: both run float32 with different summation
orders. Logits here have a standard deviation of several units; 2e-3 absolute is 10 times the worst
difference seen on two CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

TOLERANCE = 2e-3

PROMPTS = (
    "The capital of France is",
    "Once upon a time in a small village near the sea there lived an old clockmaker who",
    "def fibonacci(n):\n    ",
    "List three reasons why the sky looks blue on a clear day, and explain each of them: 1.",
)


def run(llm: Any, prompts: Sequence[list[int]], **params: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params)
    outputs = llm.generate(
        [{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False
    )
    return list(outputs)


def assert_parity(output: Any, reference: Callable[[Sequence[int]], Any]) -> None:
    for completion in output.outputs:
        token_ids = [*output.prompt_token_ids, *completion.token_ids]
        scores = completion.guard
        assert scores.num_tokens == len(token_ids), "each position exactly once"
        difference = np.abs(scores.logit_TP - reference(token_ids))
        assert difference.max() < TOLERANCE, difference.max()


@pytest.fixture(scope="module")
def prompts(llm: Any) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    return [tokenizer(p).input_ids for p in PROMPTS]


def test_single_request(llm: Any, reference: Any, prompts: list[list[int]]) -> None:
    (output,) = run(llm, prompts[:1])
    assert len(output.outputs[0].token_ids) == 12
    assert_parity(output, reference)


def test_batch_of_unequal_prompts(llm: Any, reference: Any, prompts: list[list[int]]) -> None:
    for output in run(llm, prompts * 3, max_tokens=9):
        assert_parity(output, reference)


def test_prompt_longer_than_a_step_is_chunked(llm: Any, reference: Any, prompts: Any) -> None:
    long = (prompts[1] * 12)[:200]
    (output,) = run(llm, [long])
    assert_parity(output, reference)


def test_cached_prompt_keeps_its_scores(llm: Any, reference: Any, prompts: Any) -> None:
    prompt = (prompts[3] * 10)[:150]
    (first,) = run(llm, [prompt])
    (second,) = run(llm, [prompt])
    assert second.num_cached_tokens >= 128, "the prefix cache must have been hit"
    assert_parity(second, reference)
    cached = second.num_cached_tokens
    np.testing.assert_array_equal(
        first.outputs[0].guard.logit_TP[:cached], second.outputs[0].guard.logit_TP[:cached]
    )


def test_equal_prompts_in_one_batch_share_blocks(llm: Any, reference: Any, prompts: Any) -> None:
    prompt = (prompts[0] * 20)[:100]
    for output in run(llm, [prompt, prompt, prompt]):
        assert_parity(output, reference)


def test_several_choices(llm: Any, reference: Any, prompts: Any) -> None:
    (output,) = run(llm, prompts[1:2], n=3, temperature=0.8)
    assert len(output.outputs) == 3
    assert_parity(output, reference)


def test_scores_survive_a_dropped_block_store(llm: Any, reference: Any, prompts: Any) -> None:
    """A prefix-cache hit whose scores were evicted is computed again, not left unscored."""
    prompt = (prompts[2] * 40)[:140]
    run(llm, [prompt])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler._circuit_breakers.block_scores.clear()
    (output,) = run(llm, [prompt])
    assert output.num_cached_tokens == 0
    assert_parity(output, reference)


def test_preempted_requests_start_over_with_the_same_scores(
    llm: Any, reference: Any, prompts: list[list[int]]
) -> None:
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"preempted-{i}", {"prompt_token_ids": prompt}, sampling)
    finished, steps, num_preemptions = {}, 0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        steps += 1
        if steps in (6, 11):
            num_preemptions += len(scheduler.running)
            scheduler.reset_prefix_cache(reset_running_requests=True)
    assert num_preemptions >= 2 * len(prompts), "they must have been preempted while running"
    assert len(finished) == len(prompts)
    for output in finished.values():
        assert len(output.outputs[0].token_ids) == 24
        assert_parity(output, reference)
