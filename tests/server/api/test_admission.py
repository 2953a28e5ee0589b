"""Places are limited, shared fairly between keys, and given back on every path."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.api.admission import Admission, Limits
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.refusals import shutting_down
from circuit_breakers.settings import ServeSettings

FREE = Limits()


def house(max_concurrent: int = 1, max_queued: int = 10, **more: Any) -> Admission:
    return Admission(max_concurrent=max_concurrent, max_queued=max_queued, **more)


class Crowd:
    """Requests that run until they are let go, and a diary of who ran."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.ran: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._gates: dict[str, asyncio.Event] = {}

    async def come(self, name: str, key_id: str = "a", limits: Limits = FREE) -> None:
        gate = self._gates[name] = asyncio.Event()

        async def request() -> None:
            async with self.admission.admit(key_id, limits) as ticket:
                await ticket.start()
                self.ran.append(name)
                await gate.wait()

        self.tasks[name] = asyncio.create_task(request())
        await settle()

    async def finish(self, name: str) -> None:
        self._gates[name].set()
        await self.tasks[name]
        await settle()

    def error_of(self, name: str) -> ApiError:
        error = self.tasks[name].exception()
        assert isinstance(error, ApiError), error
        return error

    async def leave(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_the_limits_of_a_key_come_from_the_settings() -> None:
    given_settings = ServeSettings(
        max_concurrent_requests_per_key=3, requests_per_minute=60, request_timeout_s=5
    )
    assert Limits.from_settings(given_settings) == Limits(
        max_concurrent=3, requests_per_minute=60, request_timeout_s=5
    )


def test_what_does_not_fit_waits_in_line_first_in_first_out() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=2))
        for name in ("1", "2", "3", "4", "5"):
            await crowd.come(name)
        assert crowd.ran == ["1", "2"]
        assert (crowd.admission.num_running, crowd.admission.num_waiting) == (2, 3)
        for name in ("2", "1", "3"):
            await crowd.finish(name)
        assert crowd.ran == ["1", "2", "3", "4", "5"]
        await crowd.leave()
        assert (crowd.admission.num_running, crowd.admission.num_waiting) == (0, 0)

    run(test())


def test_a_full_queue_turns_the_next_one_away() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=1, max_queued=1))
        for name in ("1", "2", "3"):
            await crowd.come(name)
        error = crowd.error_of("3")
        assert (error.status, error.code, error.headers) == (
            503,
            "queue_full",
            {"Retry-After": "5"},
        )
        await crowd.finish("1")
        await crowd.come("4")
        assert crowd.ran == ["1", "2"]
        await crowd.leave()

    run(test())


def test_without_a_queue_nothing_waits() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=1, max_queued=0))
        await crowd.come("1")
        await crowd.come("2")
        assert crowd.error_of("2").code == "queue_full"
        await crowd.finish("1")
        await crowd.come("3")
        assert crowd.ran == ["1", "3"]
        await crowd.leave()

    run(test())


def test_the_keys_take_turns() -> None:
    async def test() -> None:
        crowd = Crowd(house())
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            await crowd.come(name, key_id=name[0])
        for name in ("a1", "a2", "b1", "c1", "a3", "b2"):
            await crowd.finish(name)
        assert crowd.ran == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
        await crowd.leave()

    run(test())


def test_a_key_at_its_own_limit_lets_the_others_pass() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=3, max_queued=2))
        two = Limits(max_concurrent=2)
        for name in ("a1", "a2", "a3", "a4", "a5"):
            await crowd.come(name, key_id="a", limits=two)
        assert crowd.ran == ["a1", "a2"]
        # Two run and two wait; the fifth is one too many for its key, though not for the house.
        assert crowd.error_of("a5").code == "queue_full"
        await crowd.come("b1", key_id="b")
        assert crowd.ran == ["a1", "a2", "b1"]
        await crowd.finish("a1")
        assert crowd.ran[3:] == ["a3"]
        await crowd.leave()

    run(test())


def test_a_key_that_fills_the_house_makes_room_for_another() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=1, max_queued=3))
        for name in ("a1", "a2", "a3", "a4"):
            await crowd.come(name, key_id="a")
        await crowd.come("b1", key_id="b")
        # The last one of the longest line goes, and the newcomer is not it.
        assert crowd.error_of("a4").code == "queue_full"
        await crowd.come("b2", key_id="b")
        # Two and one wait: the swap would only turn that round.
        assert crowd.error_of("b2").code == "queue_full"
        await crowd.finish("a1")
        await crowd.finish("a2")
        assert crowd.ran == ["a1", "a2", "b1"]
        await crowd.leave()
        assert crowd.admission.num_inside == 0

    run(test())


def test_who_made_room_is_told_so_even_when_about_to_start() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=1, max_queued=2))
        await crowd.come("a1", key_id="a")
        await crowd.come("a2", key_id="a")
        body = asyncio.get_running_loop().create_future()

        async def a3() -> None:
            async with crowd.admission.admit("a", FREE) as ticket:
                await body
                await ticket.start()

        task = asyncio.create_task(a3())
        await settle()
        body.set_result(None)
        # In the same tick, so that a3 goes on before its end has reached it.
        async with crowd.admission.admit("b", FREE):
            await settle()
        error = task.exception()
        assert isinstance(error, ApiError) and error.code == "queue_full"
        await crowd.leave()
        assert crowd.admission.num_inside == 0

    run(test())


def test_the_rate_of_one_key_is_its_own() -> None:
    async def test() -> None:
        now_s = 100.0
        admission = house(max_concurrent=9, clock_s=lambda: now_s)
        limits = Limits(requests_per_minute=2)

        async def ask(key_id: str) -> dict[str, str]:
            async with admission.admit(key_id, limits) as ticket:
                return ticket.headers

        assert await ask("a") == {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-reset-requests": "30s",
        }
        assert (await ask("a"))["x-ratelimit-reset-requests"] == "1m0s"
        with pytest.raises(ApiError, match="2 requests a minute; try again in 30s") as caught:
            await ask("a")
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.to_json()["error"]["type"] == "requests"
        assert caught.value.headers == {
            "Retry-After": "30",
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "1m0s",
        }
        await ask("b")
        now_s = 129.75
        with pytest.raises(ApiError, match="try again in 250ms"):
            await ask("a")
        now_s = 130.0
        await ask("a")
        async with admission.admit("a", FREE) as ticket:
            assert ticket.headers == {}

    run(test())


def test_a_full_house_costs_no_token() -> None:
    async def test() -> None:
        crowd = Crowd(house(max_concurrent=1, max_queued=0))
        limits = Limits(requests_per_minute=2)
        await crowd.come("1", limits=limits)
        await crowd.come("2", limits=limits)
        assert crowd.error_of("2").code == "queue_full"
        await crowd.finish("1")
        await crowd.come("3", limits=limits)
        assert crowd.ran == ["1", "3"]
        await crowd.leave()

    run(test())


def test_time_over_is_told_apart_by_whether_the_request_ever_ran() -> None:
    async def test() -> None:
        crowd = Crowd(house())
        short = Limits(request_timeout_s=0.02)
        await crowd.come("runs", limits=short)
        await crowd.come("waits", limits=short)
        await asyncio.wait(crowd.tasks.values())
        ran, waited = crowd.error_of("runs"), crowd.error_of("waits")
        assert (ran.status, ran.code) == (504, "request_timeout")
        # The first one's end lets the second one in or not, in the same tick.
        assert (waited.status, waited.code) in ((503, "queue_timeout"), (504, "request_timeout"))
        assert crowd.admission.num_inside == 0

    run(test())


def test_a_request_that_never_ran_is_told_so() -> None:
    async def test() -> None:
        crowd = Crowd(house())
        await crowd.come("runs")
        await crowd.come("waits", limits=Limits(request_timeout_s=0.02))
        await asyncio.wait([crowd.tasks["waits"]])
        error = crowd.error_of("waits")
        assert (error.status, error.code) == (503, "queue_timeout")
        assert error.headers == {"Retry-After": "5"}
        await crowd.leave()

    run(test())


def test_a_timeout_of_the_handlers_own_stays_what_it_is() -> None:
    async def test() -> None:
        admission = house()
        with pytest.raises(TimeoutError):
            async with admission.admit("a", Limits(request_timeout_s=60)):
                raise TimeoutError
        assert admission.num_inside == 0

    run(test())


def test_a_closed_house_takes_nobody_and_can_be_emptied() -> None:
    async def test() -> None:
        crowd = Crowd(house())
        await crowd.admission.empty()
        await crowd.come("runs")
        await crowd.come("waits")
        crowd.admission.close()
        await crowd.come("late")
        late = crowd.error_of("late")
        assert (late.status, late.code) == (503, "shutting_down")
        assert late.headers == {"Retry-After": "5", "Connection": "close"}
        await crowd.finish("runs")
        assert crowd.ran == ["runs", "waits"]
        crowd.admission.end_all(shutting_down())
        await asyncio.wait_for(crowd.admission.empty(), 5)
        await settle()
        assert crowd.error_of("waits").code == "shutting_down"

    run(test())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["come", "cancel", "finish", "fail", "time over"]),
        st.sampled_from("abc"),
        st.integers(0, 30),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    actions=ACTIONS,
    max_concurrent=st.integers(1, 4),
    max_queued=st.integers(0, 4),
    own=st.none() | st.integers(1, 3),
)
def test_places_are_given_back_on_every_path(
    actions: list[tuple[str, str, int]], max_concurrent: int, max_queued: int, own: int | None
) -> None:
    async def test() -> None:
        admission = house(max_concurrent, max_queued)
        limits = Limits(max_concurrent=own, request_timeout_s=60)
        running: Counter[str] = Counter()
        most: Counter[str] = Counter()
        tasks: list[tuple[asyncio.Task[None], asyncio.Future[None], Any]] = []

        async def request(key_id: str, gate: asyncio.Future[None], keep: list[Any]) -> None:
            async with admission.admit(key_id, limits) as ticket:
                keep.append(ticket)
                await ticket.start()
                running[key_id] += 1
                most[key_id] = max(most[key_id], running[key_id])
                most["all"] = max(most["all"], running.total())
                try:
                    await gate
                finally:
                    running[key_id] -= 1

        for action, key_id, index in actions:
            if action == "come":
                gate = asyncio.get_running_loop().create_future()
                keep: list[Any] = []
                tasks.append((asyncio.create_task(request(key_id, gate, keep)), gate, keep))
            elif tasks:
                task, gate, keep = tasks[index % len(tasks)]
                if action == "cancel":
                    task.cancel()
                elif action == "time over" and keep:
                    keep[0].end(ApiError(504, "time over"))
                elif not gate.done() and action == "finish":
                    gate.set_result(None)
                elif not gate.done() and action == "fail":
                    gate.set_exception(ValueError("a bug"))
            if index % 3:  # else the next action comes in the same tick
                await settle()
            assert admission.num_running <= max_concurrent
            assert admission.num_inside <= max_concurrent + max_queued
        for _task, gate, _ in tasks:
            if not gate.done():
                gate.set_result(None)
        results = await asyncio.gather(*(task for task, _, _ in tasks), return_exceptions=True)
        expected = (ApiError, ValueError, asyncio.CancelledError, type(None))
        assert all(isinstance(result, expected) for result in results), results
        for _, gate, _ in tasks:
            gate.exception() if gate.done() and not gate.cancelled() else None
        assert most["all"] <= max_concurrent
        assert own is None or max((most[k] for k in "abc"), default=0) <= own
        assert (admission.num_inside, admission.num_running) == (0, 0)
        assert not admission._in_line
        await asyncio.wait_for(admission.empty(), 1)
        # And all of it can be had again.
        async with asyncio.timeout(5):
            crowd = Crowd(admission)
            for i in range(max_concurrent):
                await crowd.come(str(i), key_id=str(i))
            assert len(crowd.ran) == max_concurrent
            await crowd.leave()

    run(test())
