"""The breaker's identity and the operators' routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import openai
import pytest

from circuit_breakers_client import AsyncCircuitBreakers, CircuitBreakers, guard_of

from ...server.api.capitals import FRANCE, ZEBRA
from ..conftest import Guarded
from .conftest import chat


@pytest.fixture
def admin(guarded: Guarded) -> Iterator[CircuitBreakers]:
    with CircuitBreakers(base_url=guarded.url, api_key=guarded.admin_key) as client:
        yield client


def wait_for_log(admin: CircuitBreakers) -> None:
    """Until it has what was written in the background as each request ended."""
    deadline = time.monotonic() + 60
    while next(admin.breaker.trip_pages(limit=1)).num_pending:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_breaker_says_what_it_is(client: CircuitBreakers, admin: CircuitBreakers) -> None:
    breaker = client.breaker.retrieve()
    assert (breaker.name, breaker.policy, breaker.mode) == ("words", "default", "enforce")
    assert breaker.judged == ["paris", "zebra"]
    assert breaker.phases == ["completion", "prompt"]
    assert len(breaker.digest) == 64
    assert breaker.created.tzinfo is not None
    assert breaker.policies is None
    policies = admin.breaker.retrieve().policies
    assert policies is not None
    assert {"default", "refusing", "watching"} <= {policy.policy for policy in policies}


def test_trips_come_page_by_page(client: CircuitBreakers, admin: CircuitBreakers) -> None:
    start = datetime.now(UTC)
    for text in (FRANCE, ZEBRA, FRANCE):
        try:
            client.chat.completions.create(**chat(text))
        except openai.BadRequestError as error:
            assert guard_of(error)
    wait_for_log(admin)
    pages = list(admin.breaker.trip_pages(since=start, key="user", limit=2))
    assert [len(page.data) for page in pages] == [2, 1]
    assert [page.has_more for page in pages] == [True, False]
    trips = list(admin.breaker.trips(since=start, key="user", limit=2))
    assert trips == [trip for page in pages for trip in page.data]
    assert [trip.phase for trip in trips] == ["completion", "prompt", "completion"]
    assert [trip.probe for trip in trips] == ["paris", "zebra", "paris"]
    assert trips[0].time > trips[-1].time >= start
    prompts = list(admin.breaker.trips(since=start.isoformat(), key="user", phase="prompt"))
    assert prompts == [trips[1]]
    later = next(admin.breaker.trip_pages(key="user", cursor=trips[1].sequence))
    assert later.data[0] == trips[2]


def test_what_if_counts(client: CircuitBreakers, admin: CircuitBreakers) -> None:
    client.chat.completions.create(**chat(FRANCE))
    wait_for_log(admin)
    below = admin.breaker.what_if(threshold=-1000, days=1)
    assert below.thresholds == {"paris": -1000.0, "zebra": -1000.0}
    assert below.notes
    group = next(g for g in below.data if g.phase == "all" and g.policy == "default")
    # No score is below the threshold.
    assert group.num_would_trip == group.num_requests >= 1
    assert group.share == 1.0
    assert admin.breaker.what_if(target_fpr=0.05).thresholds["paris"] == -0.25
    for neither in ({}, {"threshold": 1.0, "target_fpr": 0.1}):
        with pytest.raises(ValueError, match="expected one"):
            admin.breaker.what_if(**neither)


def test_policies_are_read_again(admin: CircuitBreakers) -> None:
    reloaded = admin.breaker.reload()
    assert reloaded.default == "default"
    assert "refusing" in reloaded.policies
    assert reloaded.key_ids == ["ops", "user", "watched"]


def test_only_admins_may(client: CircuitBreakers) -> None:
    for ask in (client.breaker.reload, lambda: list(client.breaker.trips())):
        with pytest.raises(openai.PermissionDeniedError):
            ask()
    with pytest.raises(openai.PermissionDeniedError):
        client.breaker.what_if(threshold=1)


def test_the_asynchronous_client_asks_the_same(guarded: Guarded) -> None:
    async def run() -> None:
        async with AsyncCircuitBreakers(base_url=guarded.url, api_key=guarded.admin_key) as admin:
            assert (await admin.breaker.retrieve()).name == "words"
            assert (await admin.breaker.reload()).default == "default"
            assert (await admin.breaker.what_if(threshold=0)).days == 7
            trips = [trip async for trip in admin.breaker.trips(phase="prompt", limit=1)]
            assert {trip.phase for trip in trips} <= {"prompt"}
            pages = [page async for page in admin.breaker.trip_pages(limit=500)]
            assert pages[-1].has_more is False

    asyncio.run(run())
