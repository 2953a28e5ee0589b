"""A place is given back on every path: done, out of time, cancelled, failed, shut down."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.api.admission import Limits
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.refusals import shutting_down

from .crowd import Crowd, house, run, settle


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
        await asyncio.wait_for(admission.empty(), 60)
        # And all of it can be had again.
        async with asyncio.timeout(60):
            crowd = Crowd(admission)
            for i in range(max_concurrent):
                await crowd.come(str(i), key_id=str(i))
            assert len(crowd.ran) == max_concurrent
            await crowd.leave()

    run(test())
