"""Verdict, hold-back and release, on a live engine; a recorder sees all that leaves the core."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine import scheduler as scheduler_module
from circuit_breakers.engine.block_scores import BlockScores
from circuit_breakers.engine.config import EngineGuardConfig
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.engine.releases import send_scored
from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.policy import Policy

from .live_core import greedy, recording, run, thresholds

PROMPT = "Once upon a time in a small village near the sea there lived an old clockmaker who"


@pytest.fixture(scope="module")
def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture(scope="module")
def prompt(llm: Any) -> list[int]:
    return list(llm.get_tokenizer()(PROMPT).input_ids)


def test_engine_core_judges_by_the_promise_that_was_asked_for(breaker: Breaker) -> None:
    scheduler = SimpleNamespace(
        hash_block_size=16, block_size=16, kv_cache_config=SimpleNamespace(num_blocks=4)
    )
    config = EngineGuardConfig(
        breaker_path=str(breaker.path),
        breaker_digest=breaker.digest,
        mode="enforce",
        adapter="merged",
    )
    asked = dataclasses.replace(config, target_fpr=0.05)
    for of, threshold in ((config, 1e9), (asked, 5e8)):
        guard = scheduler_module.SchedulerGuard(of, scheduler)
        assert [p.threshold_logit for p in guard.policy.probes] == [threshold] * 2
        api_side = GuardedEngine(None, breaker, "enforce", None, None, target_fpr=of.target_fpr)
        assert api_side.policy.probes == guard.policy.probes


def test_every_token_leaves_with_its_score(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    with recording(scheduler, len(prompt)) as recorder:
        outputs = run(llm, prompt, num_requests=12, temperature=1.0, logprobs=1)
    assert not recorder.violations
    assert sum(recorder.num_tokens.values()) == 12 * 20
    for output in outputs:
        assert len(output.outputs[0].logprobs) == 20
        assert output.outputs[0].finish_reason == "length"


def test_recorder_sees_a_leak(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    """The recorder is not blind: without the hold-back it reports every token."""
    guard = scheduler._circuit_breakers

    def release_at_once(outputs: list[Any], _trips: Any) -> list[Any]:
        for output in outputs:
            stream = guard.stream_of(output.request_id)
            send_scored(stream, output, stream.num_judged)
            if output.finish_reason is not None:
                guard.forget([output.request_id])
        return outputs

    guard.release = release_at_once
    try:
        with recording(scheduler, len(prompt)) as recorder:
            run(llm, prompt)
    finally:
        del guard.release
    assert len(recorder.violations) == 21


def test_tripping_token_is_withheld(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    tokens, logit_TP = greedy(llm, prompt, max_tokens=60)
    completion_TP, prompt_TP = logit_TP[len(prompt) :], logit_TP[1 : len(prompt)]
    probe = int((completion_TP.max(axis=0) - prompt_TP.max(axis=0)).argmax())
    over_T = completion_TP[:, probe] > prompt_TP[:, probe].max()
    assert over_T.any(), "the completion must reach higher than the prompt"
    first = int(over_T.argmax())
    threshold = float(completion_TP[first, probe] + prompt_TP[:, probe].max()) / 2
    values = [1e9, 1e9]
    values[probe] = threshold
    with thresholds(scheduler, *values), recording(scheduler, len(prompt)) as recorder:
        (output,) = run(llm, prompt, max_tokens=60)
    completion = output.outputs[0]
    assert completion.finish_reason == "content_filter"
    assert completion.guard.trip.phase == "completion"
    assert completion.guard.trip.token_index == len(prompt) + first
    assert list(completion.token_ids) == tokens[:first]
    assert not recorder.violations


def test_prompt_trip_gives_nothing_out(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    with thresholds(scheduler, 1e9, -1e9), recording(scheduler, len(prompt)) as recorder:
        (output,) = run(llm, prompt, prompt_logprobs=1, logprobs=1)
    completion = output.outputs[0]
    assert completion.finish_reason == "content_filter"
    assert list(completion.token_ids) == []
    assert completion.text == ""
    assert output.prompt_logprobs in (None, [], [None])
    assert completion.guard.trip.phase == "prompt"
    assert completion.guard.trip.token_index == 1
    assert sum(recorder.num_tokens.values()) == 0


def test_observe_reports_and_never_stops(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    with (
        thresholds(scheduler, 1e9, -1e9, mode="observe"),
        recording(scheduler, len(prompt)) as recorder,
    ):
        (output,) = run(llm, prompt)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 20
    assert not recorder.violations


@pytest.mark.parametrize("mode", ["observe", "enforce"])
def test_step_without_scores_stops_the_request(
    llm: Any, scheduler: Any, prompt: list[int], mode: Mode
) -> None:
    llm.collective_rpc("circuit_breaker_enable", args=(False,))
    try:
        with thresholds(scheduler, 1e9, 1e9, mode=mode):
            # Not the cached prompt: cached tokens have their scores.
            (output,) = run(llm, prompt[::-1])
    finally:
        llm.collective_rpc("circuit_breaker_enable", args=(True,))
    completion = output.outputs[0]
    assert completion.finish_reason == "content_filter"
    assert list(completion.token_ids) == []
    assert np.isnan(completion.guard.trip.score)


def test_stop_token_is_not_given_out(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    """It is never fed back, so it never has a score."""
    tokens, _ = greedy(llm, prompt)
    stop = tokens[6]
    with recording(scheduler, len(prompt)) as recorder:
        (output,) = run(llm, prompt, stop_token_ids=[stop], logprobs=0)
    completion = output.outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason is None, "it would name the withheld token"
    assert list(completion.token_ids) == tokens[: tokens.index(stop)]
    assert len(completion.logprobs) == len(completion.token_ids)
    assert not recorder.violations


def test_stop_string_ends_on_scored_tokens(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    (whole,) = run(llm, prompt)
    word = whole.outputs[0].text.split()[4]
    with recording(scheduler, len(prompt)) as recorder:
        (output,) = run(llm, prompt, stop=[word])
    assert output.outputs[0].finish_reason == "stop"
    assert word not in output.outputs[0].text
    assert not recorder.violations


def test_blocks_that_a_hit_counts_on_are_not_evicted_first() -> None:
    store = BlockScores(block_size=2, capacity=2)
    store.put("a", bytes(8))
    store.put("b", bytes(8))
    assert store.knows(["a"], 2)
    store.put("c", bytes(8))
    assert store.get("a") is not None
    assert not store.knows(["b"], 2)


def test_context_end_withholds_the_unscorable_token(llm: Any, prompt: list[int]) -> None:
    long = (prompt * 40)[:505]
    (output,) = run(llm, long, max_tokens=7)
    # 512 positions; the token at position 511 could only be scored by a step beyond the context.
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_abort_forgets_the_stream(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request("gone", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=50))
    for _ in range(3):
        engine.step()
    assert scheduler._circuit_breakers.num_streams == 1
    engine.abort_request(["gone"])
    while engine.has_unfinished_requests():
        engine.step()
    assert scheduler._circuit_breakers.num_streams == 0
    assert not scheduler.requests


def test_trip_frees_the_request(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    with thresholds(scheduler, 1e9, -1e9):
        run(llm, prompt, num_requests=4)
    assert pool.get_num_free_blocks() == free
    assert not scheduler.requests
    assert scheduler._circuit_breakers.num_streams == 0


def test_neighbours_of_a_tripped_request_go_on(llm: Any, scheduler: Any, prompt: list[int]) -> None:
    other = llm.get_tokenizer()("def fibonacci(n):").input_ids
    peaks = [greedy(llm, p)[1][1:, 1].max() for p in (prompt, other)]
    victim, survivor = (prompt, other) if peaks[0] > peaks[1] else (other, prompt)
    expected, _ = greedy(llm, survivor)
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with thresholds(scheduler, 1e9, float(sum(peaks)) / 2):
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in (survivor, victim, survivor)],
            sampling,
            use_tqdm=False,
        )
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "content_filter", "length"]
    for output in (outputs[0], outputs[2]):
        assert list(output.outputs[0].token_ids) == expected


def judged_by(scheduler: Any, *values: float, mode: Mode = "enforce", **changes: Any) -> Any:
    """The `extra_args` of a request with these thresholds."""
    policy: Policy = scheduler._circuit_breakers.policy
    probes = tuple(
        p.model_copy(update={"threshold_logit": v})
        for p, v in zip(policy.probes, values, strict=True)
    )
    return own_args(dataclasses.replace(policy, probes=probes, mode=mode, **changes))


def test_streams_of_one_step_are_judged_each_by_its_own_policy(
    llm: Any, scheduler: Any, prompt: list[int]
) -> None:
    """One prompt, so that all of them have the same scores in the same steps."""
    from vllm import SamplingParams

    tokens, logit_TP = greedy(llm, prompt)
    below = float(logit_TP[1:, 1].max()) - 1e-3
    completion = frozenset({"completion"})
    sent = [
        None,
        judged_by(scheduler, 1e9, below),
        judged_by(scheduler, 1e9, below, mode="observe"),
        judged_by(scheduler, 1e9, below, judged=frozenset({"layer4"})),
        judged_by(scheduler, 1e9, -1e9, phases=completion),
        judged_by(scheduler, 1e9, -1e9),
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, extra_args=args)
        for args in sent
    ]
    prompts = [{"prompt_token_ids": prompt}] * len(sent)
    with recording(scheduler, len(prompt)) as recorder:
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    stopped, others = outputs[1], [outputs[i] for i in (0, 2, 3)]
    assert [o.finish_reason for o in others] == ["length"] * 3
    assert all(list(o.token_ids) == tokens for o in others)
    assert stopped.finish_reason == "content_filter"
    first = int((logit_TP[1:, 1] >= np.float32(below)).argmax()) + 1
    assert stopped.guard.trip.token_index == first
    assert [(o.finish_reason, o.guard.trip.phase) for o in outputs[4:]] == [
        ("content_filter", "completion"),
        ("content_filter", "prompt"),
    ]
    assert outputs[4].guard.trip.token_index == len(prompt)
    assert not recorder.violations
    assert scheduler._circuit_breakers._streams.screen is None


def test_a_policy_that_looks_away_stops_a_step_without_scores(
    llm: Any, scheduler: Any, prompt: list[int]
) -> None:
    """Neither observe mode, nor a phase or probe that is left out, lets an unscored token pass."""
    args = judged_by(
        scheduler,
        *(1e9, 1e9),
        mode="observe",
        phases=frozenset({"completion"}),
        judged=frozenset({"layer4"}),
    )
    llm.collective_rpc("circuit_breaker_enable", args=(False,))
    try:
        (output,) = run(llm, prompt[::-1], extra_args=args)
    finally:
        llm.collective_rpc("circuit_breaker_enable", args=(True,))
    assert output.outputs[0].finish_reason == "content_filter"
    assert list(output.outputs[0].token_ids) == []
