"""GuardedEngine against engines that misbehave: nothing unjudged gets through.

The engines here are faulty on purpose; the healthy one is real (test_scheduler.py and the API
tests).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.delivery import TokenScores
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.engine.session import GuardSession, governed_by, guard_session
from circuit_breakers.errors import ConfigError, UnguardedOutputError
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.policy import Policy

PROMPT_TOKENS = 3


class FaultyEngine:
    """Gives out one delta a step, with as many scores as the test says."""

    def __init__(self, steps: list[tuple[int, list[float]]]) -> None:
        """steps: (tokens given out, first-probe logits that come with them)."""
        self.steps = steps
        self.closed = False
        self.calls: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.secret = "internal"

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def generate(
        self, prompt: Any, params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        self.calls.append({"params": params, **kwargs})
        return self._steps()

    async def _steps(self) -> AsyncGenerator[Any, None]:
        scores = TokenScores()
        try:
            for num_tokens, logits in self.steps:
                rows_TP = np.zeros((len(logits), 2), np.float32)
                rows_TP[:, 0] = logits
                scores.extend(scores.num_tokens, 2, rows_TP.tobytes(), None)
                completion = SimpleNamespace(
                    index=0,
                    finish_reason=None,
                    token_ids=list(range(num_tokens)),
                    guard=scores if logits or scores.num_tokens else None,
                )
                yield SimpleNamespace(
                    prompt_token_ids=[0] * PROMPT_TOKENS, outputs=[completion], finished=False
                )
        finally:
            self.closed = True


def guarded(engine: FaultyEngine, breaker: Breaker, mode: Mode = "enforce") -> GuardedEngine:
    tripping = breaker.manifest.probes[0].model_copy(update={"threshold_logit": 5.0})
    manifest = breaker.manifest.model_copy(
        update={"probes": (tripping, *breaker.manifest.probes[1:])}
    )
    changed = Breaker(
        path=breaker.path, manifest=manifest, digest=breaker.digest, weights=breaker.weights
    )
    return GuardedEngine(engine, changed, mode, None, None)


def deliver(
    engine: GuardedEngine, policy: Policy | None = None
) -> tuple[int, GuardSession, Exception | None]:
    """Tokens that got through, the session, and what ended the stream."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(output_kind=RequestOutputKind.DELTA)

    async def consume() -> tuple[int, GuardSession, Exception | None]:
        through = 0
        with guard_session(policy=policy) as session:
            try:
                async for output in engine.generate("x", params, "r"):
                    through += len(output.outputs[0].token_ids)
            except UnguardedOutputError as error:
                return through, session, error
        return through, session, None

    return asyncio.run(consume())


def test_scored_tokens_get_through(breaker: Breaker) -> None:
    engine = FaultyEngine([(1, [0, 1, 1, 1]), (2, [2, 3])])
    through, session, error = deliver(guarded(engine, breaker))
    assert (through, error) == (3, None)
    assert session.num_delivered_tokens == 3
    assert session.reports()[0].score == 3.0
    assert session.first_delivery_s is not None


@pytest.mark.parametrize("mode", ["observe", "enforce"])
@pytest.mark.parametrize(
    "steps",
    [
        [(1, [])],  # no scores at all: the plugin is not live
        [(1, [0, 1, 1])],  # prompt scored, token not
        [(1, [0, 1, 1, 1]), (2, [1])],  # one token ahead of its score
    ],
)
def test_token_ahead_of_its_score_is_withheld(
    breaker: Breaker, mode: Mode, steps: list[tuple[int, list[float]]]
) -> None:
    engine = FaultyEngine(steps)
    through, _, error = deliver(guarded(engine, breaker, mode))
    assert isinstance(error, UnguardedOutputError)
    assert through == sum(n for n, _ in steps[:-1])
    assert engine.closed
    assert engine.aborted == ["r"]


def test_token_past_a_trip_is_withheld_and_counted(breaker: Breaker) -> None:
    engine = FaultyEngine([(1, [0, 1, 1, 1]), (3, [2, 9, 1])])
    through, session, error = deliver(guarded(engine, breaker))
    assert isinstance(error, UnguardedOutputError)
    assert through == 1
    # The trip is at completion token 2 of 0..3; tokens 2 and 3 are at or past it.
    assert session.num_leaked == 2


def test_observe_lets_a_trip_through_and_reports_it(breaker: Breaker) -> None:
    engine = FaultyEngine([(1, [0, 1, 1, 9])])
    through, session, error = deliver(guarded(engine, breaker, "observe"))
    assert (through, error) == (1, None)
    assert session.reports()[0].tripped
    assert session.prompt_tripped is None


def test_a_session_is_judged_by_its_own_policy(breaker: Breaker) -> None:
    steps = [(1, [0, 1, 1, 1]), (3, [2, 9, 1])]
    own = guarded(FaultyEngine([]), breaker).policy
    observing = dataclasses.replace(own, mode="observe", name="watch")
    through, session, error = deliver(guarded(FaultyEngine(steps), breaker), observing)
    assert (through, error) == (4, None)
    report = session.reports()[0]
    assert (report.policy, report.mode, report.tripped) == ("watch", "observe", True)
    _, _, error = deliver(guarded(FaultyEngine(steps), breaker, "observe"), own)
    assert isinstance(error, UnguardedOutputError), "stricter than the engine's own"


def test_the_engine_core_gets_the_policy_of_the_session(breaker: Breaker) -> None:
    from vllm import SamplingParams

    faulty = FaultyEngine([])
    engine = guarded(faulty, breaker)
    strict = dataclasses.replace(engine.policy, phases=frozenset({"prompt"}))
    client = SamplingParams(extra_args={"circuit_breakers": {"mode": "observe"}})
    with guard_session(policy=strict):
        engine.generate("x", client, "1")
    assert faulty.calls[-1]["params"].extra_args == own_args(strict)
    # A route that opens its session without one is governed all the same.
    with governed_by(strict), guard_session():
        engine.generate("x", client, "2")
    assert faulty.calls[-1]["params"].extra_args == own_args(strict)
    with guard_session():
        engine.generate("x", client, "3")
    assert faulty.calls[-1]["params"].extra_args is None


def test_choices_are_numbered_through_all_prompts(breaker: Breaker) -> None:
    session = GuardSession()
    assert [session.add_request(n) for n in (2, 3, 1)] == [0, 2, 5]
    assert session.report_for(0) is None


def test_a_prompt_that_was_stopped_within_has_its_verdict(breaker: Breaker) -> None:
    """Or the stream of the prompts beside it would wait for its own end."""
    session = GuardSession()
    policy = guarded(FaultyEngine([]), breaker).policy
    stopped, running = (session.stream(policy, choice, PROMPT_TOKENS) for choice in range(2))
    for stream in (stopped, running):
        stream.breaker.update(np.zeros((PROMPT_TOKENS - 1, 2), np.float32))
    assert session.judged_choices() == set()
    stopped.stopped = True
    assert session.judged_choices() == {0}


def test_client_cannot_choose_adapter_or_engine_parameters(breaker: Breaker) -> None:
    from vllm import SamplingParams

    engine = FaultyEngine([])
    params = SamplingParams(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})
    guarded(engine, breaker).generate("x", params, "r")
    (call,) = engine.calls
    assert call["lora_request"] is None
    assert call["params"].extra_args is None


def test_engine_is_reachable_by_allow_list_only(breaker: Breaker) -> None:
    engine = guarded(FaultyEngine([]), breaker)
    for name in ("secret", "encode", "add_lora", "sleep", "update_weights", "pause_generation"):
        with pytest.raises(AttributeError, match="behind the guard"):
            getattr(engine, name)


def test_streaming_prompt_is_refused(breaker: Breaker) -> None:
    from vllm import SamplingParams

    async def stream() -> AsyncGenerator[str, None]:
        yield "x"

    with pytest.raises(ConfigError, match="streaming prompt"):
        guarded(FaultyEngine([]), breaker).generate(stream(), SamplingParams(), "r")


def test_request_that_fails_on_its_way_in_is_not_left_registered(breaker: Breaker) -> None:
    from vllm import SamplingParams

    class Refusing(FaultyEngine):
        async def _steps(self) -> AsyncGenerator[Any, None]:
            raise OverflowError
            yield

    async def consume(engine: FaultyEngine) -> None:
        async for _ in guarded(engine, breaker).generate("x", SamplingParams(), "r"):
            pass

    engine = Refusing([])
    with pytest.raises(OverflowError):
        asyncio.run(consume(engine))
    assert engine.aborted == ["r"]


def test_only_a_listed_lora_runs_and_as_the_operator_gave_it(breaker: Breaker) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    faulty = FaultyEngine([])
    listed = LoRARequest("style", 2, "/adapters/style")
    engine = GuardedEngine(faulty, breaker, "enforce", None, None, {"style": listed})
    engine.generate("hi", SamplingParams(), "1", lora_request=LoRARequest("style", 7, "/elsewhere"))
    assert faulty.calls[-1]["lora_request"] is listed
    engine.generate("hi", SamplingParams(), "2")
    assert faulty.calls[-1]["lora_request"] is None
    with pytest.raises(ConfigError, match=r"'other'.*style"):
        engine.generate("hi", SamplingParams(), "3", lora_request=LoRARequest("other", 3, "/x"))


def test_a_dynamic_breaker_is_pinned(breaker: Breaker) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    faulty = FaultyEngine([])
    pinned = LoRARequest("circuit-breaker", 1, "/breaker/adapter")
    engine = GuardedEngine(faulty, breaker, "enforce", pinned, None)
    for asked in (None, LoRARequest("other", 3, "/x")):
        engine.generate("hi", SamplingParams(), "1", lora_request=asked)
        assert faulty.calls[-1]["lora_request"] is pinned
