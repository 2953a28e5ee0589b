"""Random schedules against a slow oracle: whatever the scheduler does to a request, each of its
positions is scored exactly once, in order, as a fresh forward of transformers scores it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import tiny
from .tiny import Rig, core_of

_MAX_STEPS = 3_000

# Prompts share prefixes, so that the prefix cache is hit in full and in part.
_PREFIXES = [[(7 * i * (k + 2) + k) % 300 + 10 for i in range(140)] for k in range(2)]
_prompts = st.builds(
    lambda prefix, length, tail: _PREFIXES[prefix][:length] + tail,
    st.integers(0, 1),
    st.sampled_from([1, 31, 33, 64, 100, 140]),
    st.lists(st.integers(10, 300), max_size=5),
)
_adds = st.fixed_dictionaries(
    {
        "prompt": _prompts,
        "max_tokens": st.integers(1, 40),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "priority": st.integers(0, 2),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 1]),
    }
)
_operations = st.one_of(
    st.tuples(st.just("add"), _adds),
    st.tuples(st.just("add"), _adds),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 7)),
    st.tuples(st.just("reset"), st.booleans()),
)


@settings(
    max_examples=40,
    # A counterexample may leave requests in the engine: the first one is the one to read.
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=st.lists(_operations, min_size=4, max_size=24))
def test_every_position_is_scored_once_and_as_transformers_would(
    rig: Rig, operations: list[tuple[str, Any]]
) -> None:
    rig.recorder.clear()
    _run(rig.llm.llm_engine, core_of(rig.llm).scheduler, operations)
    _check(rig)


def test_schedules_reach_preemption_and_the_prefix_cache(rig: Rig) -> None:
    """The property above is not empty: its engine preempts, and hits the cache."""
    rig.recorder.clear()
    engine = rig.llm.llm_engine
    add = {"max_tokens": 110, "n": 1, "temperature": 0.0, "ignore_eos": True, "logprobs": None}
    prompts = [[*_PREFIXES[i % 2][:100], 10 + i] for i in range(8)]
    operations: list[tuple[str, Any]] = [
        ("add", add | {"prompt": p, "priority": i}) for i, p in enumerate(prompts)
    ]
    before = (rig.recorder.num_preemptions, rig.recorder.num_cached_tokens)
    _run(engine, core_of(rig.llm).scheduler, [*operations, ("step", 3), *operations])
    assert rig.recorder.num_preemptions > before[0]
    assert rig.recorder.num_cached_tokens > before[1]
    _check(rig)


def test_scores_end_where_the_tokens_end(rig: Rig) -> None:
    """Also where a draft that was accepted in the last step lies behind max_tokens."""
    from vllm import SamplingParams

    rig.recorder.clear()
    engine = rig.llm.llm_engine
    for i in range(24):
        # One token for ever: all of ngram's drafts are accepted.
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=1 + i,
            ignore_eos=True,
            allowed_token_ids=[50],
            detokenize=False,
        )
        engine.add_request(f"r{i}", {"prompt_token_ids": [10 + i, 50, 50, 50, 50]}, sampling)
    while engine.has_unfinished_requests():
        engine.step()
    for request_id, prompt in rig.recorder.prompts.items():
        num_tokens = len(prompt) + len(rig.recorder.tokens(request_id))
        assert len(rig.recorder.check_order(request_id)) == num_tokens


def test_a_stop_token_takes_nothing_else_with_it(rig: Rig) -> None:
    """vLLM's detokenizer leaves the last token of a stopped output out, as its stop token is that.

    A stop token without a score has gone already here; then such an output has no tokens.
    """
    from vllm import SamplingParams

    rig.recorder.clear()
    engine = rig.llm.llm_engine
    max_tokens = {}
    for i in range(60):
        # Two tokens at random: about half of ngram's drafts are accepted, and one of them stops.
        sampling = SamplingParams(
            temperature=1.0,
            seed=i,
            max_tokens=1 + i % 6,
            allowed_token_ids=[50, 51],
            stop_token_ids=[51],
            ignore_eos=True,
            detokenize=False,
        )
        engine.add_request(f"r{i}", {"prompt_token_ids": [10 + i, 50, 51, 50, 50, 51]}, sampling)
        max_tokens[f"r{i}"] = sampling.max_tokens
    reasons = set()
    while engine.has_unfinished_requests():
        for output in engine.step():
            (completion,) = output.outputs
            if output.finished:
                # A stop token that was a draft has its score, and is there.
                has_stop = 51 in completion.token_ids
                is_full = len(completion.token_ids) == max_tokens[output.request_id]
                expected = "length" if is_full and not has_stop else "stop"
                assert completion.finish_reason == expected
                reasons.add(completion.finish_reason)
    assert "stop" in reasons
    for deliveries in rig.recorder.deliveries.values():
        if deliveries[-1].stopped:
            assert deliveries[-1].token_ids[-1:] in ((), (51,))


def _run(engine: Any, scheduler: Any, operations: list[tuple[str, Any]]) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names: list[str] = []
    for kind, value in operations:
        if kind == "add":
            name = f"r{len(names)}"
            names.append(name)
            sampling = SamplingParams(
                n=value["n"] if value["temperature"] else 1,
                temperature=value["temperature"],
                max_tokens=value["max_tokens"],
                ignore_eos=value["ignore_eos"],
                logprobs=value["logprobs"],
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": value["prompt"]}
            engine.add_request(name, prompt, sampling, priority=value["priority"])
        elif kind == "step":
            for _ in range(value):
                if engine.has_unfinished_requests():
                    engine.step()
        elif kind == "abort" and value < len(names):
            engine.abort_request([names[value]])
        elif kind == "reset":
            # With running requests in it, this preempts them all in the middle of a step.
            scheduler.reset_prefix_cache(reset_running_requests=value)
    for _ in range(_MAX_STEPS):
        # With async scheduling the scheduler has requests one step longer than the engine.
        if not (engine.has_unfinished_requests() or scheduler.has_requests()):
            break
        engine.step()
    else:
        raise AssertionError(f"requests left after {_MAX_STEPS} steps: {scheduler.requests}")
    assert scheduler._circuit_breakers.num_streams == 0


def _check(rig: Rig) -> None:
    for request_id, prompt in rig.recorder.prompts.items():
        logit_TP = rig.recorder.check_order(request_id)
        deliveries = rig.recorder.deliveries[request_id]
        token_ids = prompt + rig.recorder.tokens(request_id)
        if deliveries and deliveries[-1].finished:
            assert len(logit_TP) == len(token_ids)
        if len(logit_TP):
            # Without a last output (aborted), scores may be ahead of tokens by a step's drafts.
            num_known = min(len(logit_TP), len(token_ids))
            expected_TP = rig.oracle(token_ids)[:num_known]
            assert np.abs(logit_TP[:num_known] - expected_TP).max() < tiny.TOLERANCE
