"""What counts as a passed canary, and what follows when one fails while the server runs.

That canaries pass through the real engine, at the start and later, test_observability.py shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.canary import check_verdict, run_canaries, watch_canaries, watched
from circuit_breakers.api.service import Service
from circuit_breakers.api.serving import Serving
from circuit_breakers.artifact.manifest import Canary, Message
from circuit_breakers.engine.session import current_session, governed_by
from circuit_breakers.errors import NotReadyError
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.guard.policy import Policy
from circuit_breakers.settings import ServeSettings

from ..policies.manifests import manifest
from .scripted import scripted_server


def canary(label: Literal["harmful", "benign"]) -> Canary:
    return Canary(messages=(Message(role="user", content="x"),), label=label)


def report(score: float | None, **changes: Any) -> GuardReport:
    tripped = score is None or score >= 1.0
    values: dict[str, Any] = {
        "breaker": "b",
        "policy": "default",
        "mode": "observe",
        "tripped": tripped,
        "phase": "prompt" if tripped else None,
        "probe": "p",
        "score": score,
        "threshold": 1.0,
        "token_index": 3,
    }
    return GuardReport(**(values | changes))


def test_a_harmful_canary_must_trip_and_a_benign_one_must_not() -> None:
    check_verdict(0, canary("harmful"), report(2.0))
    check_verdict(0, canary("benign"), report(0.5))
    with pytest.raises(NotReadyError, match=r"canary 3 \(harmful\) passed: score 0\.500"):
        check_verdict(3, canary("harmful"), report(0.5))
    with pytest.raises(NotReadyError, match=r"canary 0 \(benign\) tripped: score 2\.000"):
        check_verdict(0, canary("benign"), report(2.0))


@pytest.mark.parametrize("seen", [None, report(None), report(2.0, num_unscored=1)])
def test_a_missing_score_fails_a_harmful_canary_too(seen: GuardReport | None) -> None:
    # Fail closed: such a token trips, but it proves no probe.
    with pytest.raises(NotReadyError, match="got no score"):
        check_verdict(0, canary("harmful"), seen)


class ProbedServing:
    """Takes the part of `Serving`: scores a prompt of two tokens, and breaks off if told to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.scores = {"harmful": 0.0 if fails else 9.0, "benign": 0.0}
        self.breaks = False
        self.num_engines = 1
        self.asked: list[int] = []
        """Engines that a canary was sent to by number."""
        self.num_started = 0
        self.salts: set[str] = set()
        canaries = tuple(
            Canary(messages=(Message(role="user", content=label),), label=label)
            for label in ("harmful", "benign")
        )
        made = manifest().model_copy(update={"canaries": canaries})
        # Probe p0 trips from 4 on.
        policy = Policy.from_manifest(made, "enforce")
        breaker = SimpleNamespace(manifest=made, digest="d" * 64)
        self.guarded = SimpleNamespace(breaker=breaker, policy=policy, errored=False)

    def parse(self, endpoint: str, data: dict[str, Any], *, max_choices: int) -> Any:
        return SimpleNamespace(request=SimpleNamespace(**data), ask_engine=self.asked.append)

    async def start(self, call: Any) -> None:
        self.num_started += 1
        if self.breaks:
            raise RuntimeError("the engine broke")
        session = current_session()
        assert session is not None and session.policy is None
        self.salts.add(call.request.cache_salt)
        score = self.scores[call.request.messages[-1]["content"]]
        stream = session.stream(self.guarded.policy, 0, 2)
        stream.breaker.update(np.array([[0.0, 0.0], [score, 0.0]], np.float32))


class Watched(NamedTuple):
    serving: Any
    service: Service
    http: httpx.AsyncClient

    def sample(self, name: str, **labels: str) -> float | None:
        return self.service.registry.get_sample_value(f"circuit_breakers_{name}", labels)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


def run(test: Callable[[Watched], Awaitable[None]], **settings: Any) -> None:
    """Runs a test on a ready server with a ProbedServing."""

    async def main() -> None:
        serving: Any = ProbedServing()
        app = create_app(ServeSettings(model="m", **settings), CollectorRegistry(), serving)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await test(Watched(serving, app.state.service, http))

    asyncio.run(main())


def test_a_failing_canary_makes_the_server_unready_until_they_pass_again() -> None:
    async def test(on: Watched) -> None:
        async with watched(on.service, on.serving):
            await on.until(lambda: on.serving.num_started >= 4)
            assert (await on.http.get("/readyz")).status_code == 200
            on.serving.scores["harmful"] = 1.0
            await on.until(lambda: on.service.failed_canary is not None)
            ready = await on.http.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["reason"].startswith("canary 0 (harmful) passed: score 1.000")
            refused = await on.http.post("/v1/chat/completions", json={})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            assert (on.sample("ready"), on.sample("canary_ok")) == (0, 0)
            assert (on.sample("canary_failures_total") or 0) >= 1
            on.serving.scores["harmful"] = 9.0
            await on.until(lambda: on.service.failed_canary is None)
            assert (await on.http.get("/readyz")).status_code == 200
            assert (on.sample("ready"), on.sample("canary_ok")) == (1, 1)

    run(test, canary_interval_s=0.02)


def test_an_engine_that_gives_no_answer_fails_a_canary_too() -> None:
    async def test(on: Watched) -> None:
        on.serving.breaks = True
        with pytest.raises(NotReadyError, match=r"canary 0 \(harmful\) got no answer \(the eng"):
            await run_canaries(on.service, on.serving)
        assert on.sample("canary_ok") == 0

    run(test)


def test_canaries_count_as_scored_tokens_and_as_nothing_else() -> None:
    async def test(on: Watched) -> None:
        # As if a caller's request had started them.
        with governed_by(on.serving.guarded.policy):
            await run_canaries(on.service, on.serving)
        assert on.sample("canary_ok") == 1
        assert len(on.serving.salts) == 2, "no canary is scored from a cache"
        # Two canaries of two tokens each.
        assert on.sample("scored_tokens_total", model="m") == 4
        counts = [
            s.value
            for family in on.service.registry.collect()
            for s in family.samples
            if s.name.startswith(("circuit_breakers_requests", "circuit_breakers_trips_total"))
            or s.name == "circuit_breakers_score_count"
            if not s.name.endswith("_created")
        ]
        assert len(counts) == 6 + 4 + 2  # outcomes, phases times actions, phases
        assert not any(counts)

    run(test)


def test_every_engine_has_its_canaries() -> None:
    async def test(on: Watched) -> None:
        await run_canaries(on.service, on.serving)
        assert on.serving.asked == []
        on.serving.num_engines = 2
        await run_canaries(on.service, on.serving)
        # vLLM would send all of them to the least loaded one, the first.
        assert on.serving.asked == [0, 0, 1, 1]

    run(test)


@pytest.mark.parametrize(("local_only", "num_engines"), [(False, 4), (True, 2)])
def test_engines_are_those_that_this_server_can_ask(local_only: bool, num_engines: int) -> None:
    """Behind a load balancer of several servers, vLLM takes only the numbers of the local ones."""
    parallel = SimpleNamespace(
        data_parallel_size=4, data_parallel_size_local=2, local_engines_only=local_only
    )
    guarded = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    serving: Any = SimpleNamespace(guarded=guarded)
    assert Serving.num_engines.fget(serving) == num_engines


def test_nothing_that_waits_or_runs_goes_on_once_a_canary_has_failed() -> None:
    async def test() -> None:
        async with scripted_server(max_concurrent_requests=1, canary_interval_s=0.05) as server:
            running = asyncio.create_task(server.post(stream=True, num_events=600, pause_s=0.1))
            waiting = asyncio.create_task(server.post())
            async with asyncio.timeout(10):
                while server.service.admission.num_inside < 2 or not server.serving.num_open:
                    await asyncio.sleep(0.01)
            async with watched(server.service, ProbedServing(fails=True)):
                ended = await asyncio.wait_for(waiting, 10)
                stream = await asyncio.wait_for(running, 10)
            assert (ended.status_code, ended.json()["error"]["code"]) == (503, "not_ready")
            assert '"code":"not_ready"' in stream.text and "[DONE]" not in stream.text
            assert server.serving.num_started == 1
            await server.nothing_left()

    asyncio.run(test())


def test_a_canary_that_fails_while_a_request_waits_is_noticed_before_the_engine() -> None:
    async def test() -> None:
        async with scripted_server(max_concurrent_requests=1) as server:
            first = asyncio.create_task(server.post(num_events=1, pause_s=0.3))
            waiting = asyncio.create_task(server.post())
            async with asyncio.timeout(10):
                while server.service.admission.num_inside < 2 or not server.serving.num_open:
                    await asyncio.sleep(0.01)
            server.service.failed_canary = "canary 0 passed"
            assert (await first).status_code == 200
            assert (await waiting).status_code == 503
            assert server.serving.num_started == 1

    asyncio.run(test())


def test_interval_0_runs_them_at_the_start_only() -> None:
    async def test(on: Watched) -> None:
        await asyncio.wait_for(watch_canaries(on.service, on.serving), 10)
        assert on.serving.num_started == 0

    run(test, canary_interval_s=0)
