"""Places are limited, and shared fairly between keys."""

from __future__ import annotations

import asyncio

import pytest

from circuit_breakers.api.admission import Limits
from circuit_breakers.api.errors import ApiError
from circuit_breakers.settings import ServeSettings

from .crowd import FREE, Crowd, house, run, settle


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
