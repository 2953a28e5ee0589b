"""The breaker that is live, and what operators can ask of it: trips, what-if, reload.

An answer has the fields that the server sends; like openai's own models, these types do not check
them, and keep fields that they do not know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import openai

from circuit_breakers_client.errors import UnguardedError
from circuit_breakers_client.report import Mode, Phase, field_of

__all__ = [
    "AsyncBreakerResource",
    "Breaker",
    "BreakerResource",
    "PolicyState",
    "ReloadedPolicies",
    "Trip",
    "TripPage",
    "WhatIf",
    "WhatIfGroup",
]


class PolicyState(openai.BaseModel):
    """How requests are judged under one policy."""

    policy: str
    mode: Mode
    action: Literal["stop", "refuse", "error"]
    phases: list[Phase]
    judged: list[str]
    """Names of the probes that are judged."""
    operating_point: dict[str, Any] | None = None
    """The promise that the policy keeps; None for thresholds of the operator's own, and where means
    start with the completion."""
    probes: list[dict[str, Any]]


class Breaker(PolicyState):
    """The breaker, and the policy of whoever asks."""

    name: str
    digest: str
    created: datetime
    calibration_age_s: int
    base_model: dict[str, Any]
    policies: list[PolicyState] | None = None
    """Every policy, for admins."""


class Trip(openai.BaseModel):
    """One trip in the audit log, without content."""

    id: str
    sequence: int
    time: datetime
    action: str
    request_id: str
    key_id: str
    model: str
    policy: str
    breaker: str
    phase: Phase
    probe: str | None = None
    score: float | None = None
    threshold: float | None = None
    token_index: int | None = None
    choice: int | None = None


class TripPage(openai.BaseModel):
    """Trips, the newest first."""

    data: list[Trip]
    has_more: bool
    next_cursor: int | None = None
    num_pending: int
    """Trips that the log has not taken in yet."""


class WhatIfGroup(openai.BaseModel):
    """Requests of one policy, by the phase in which they would first trip."""

    breaker: str
    policy: str
    phase: Literal["prompt", "completion", "all"]
    num_requests: int
    num_tripped: int
    """As it was."""
    num_would_trip: int
    """As it would have been, for certain."""
    num_unknown: int
    """Stopped before it could be told."""
    share: float | None = None
    share_low: float
    share_high: float


class WhatIf(openai.BaseModel):
    """What other thresholds would have done to the requests of the last days."""

    breaker: str
    days: int
    since: datetime
    is_complete: bool
    thresholds: dict[str, float]
    data: list[WhatIfGroup]
    notes: list[str]
    """What the numbers cannot know."""


class ReloadedPolicies(openai.BaseModel):
    """What is in force after the policy file was read again."""

    digest: str | None = None
    default: str | None = None
    policies: list[str]
    key_ids: list[str]


class BreakerResource:
    """client.breaker of the synchronous client."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client

    def retrieve(self) -> Breaker:
        """The breaker that is live.

        Raises:
            UnguardedError: the server knows of none, or answers something else.
        """
        try:
            return _checked(self._client.get("/breaker", cast_to=Breaker))
        except openai.NotFoundError as error:
            raise _no_breaker(error) from error

    def trips(self, **query: Any) -> Iterator[Trip]:
        """Every trip that fits, the newest first, page by page as they are asked for.

        Args:
            query: as for trip_pages.
        """
        return (trip for page in self.trip_pages(**query) for trip in page.data)

    def trip_pages(
        self,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        key: str | None = None,
        policy: str | None = None,
        phase: Phase | None = None,
        probe: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> Iterator[TripPage]:
        """Pages of the trips that fit; for admins.

        Args:
            since, until: a time with its zone; `until` is excluded.
            key: public id of an API key.
            limit: trips on one page, at most 500.
            cursor: `next_cursor` of the page to go on after.
        """
        query = _trip_query(since, until, key, policy, phase, probe, limit)
        while True:
            params = query if cursor is None else query | {"cursor": cursor}
            page = self._client.get("/breaker/trips", cast_to=TripPage, options={"params": params})
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    def what_if(
        self,
        *,
        threshold: float | None = None,
        target_fpr: float | None = None,
        days: int | None = None,
    ) -> WhatIf:
        """What other thresholds would have done to the requests of the last days; for admins.

        Args:
            threshold: a logit for every probe; give this or target_fpr.
            target_fpr: thresholds that the breaker's calibration proves this share for.
        """
        params = _what_if_query(threshold, target_fpr, days)
        return self._client.get("/breaker/what-if", cast_to=WhatIf, options={"params": params})

    def reload(self) -> ReloadedPolicies:
        """Makes the server read its policy file again; for admins.

        Raises:
            openai.BadRequestError: the file does not fit, and the old policies stay in force.
        """
        return self._client.post("/breaker/reload", cast_to=ReloadedPolicies)


class AsyncBreakerResource:
    """client.breaker of the asynchronous client; see BreakerResource."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client

    async def retrieve(self) -> Breaker:
        """The breaker that is live.

        Raises:
            UnguardedError: the server knows of none, or answers something else.
        """
        try:
            return _checked(await self._client.get("/breaker", cast_to=Breaker))
        except openai.NotFoundError as error:
            raise _no_breaker(error) from error

    async def trips(self, **query: Any) -> AsyncIterator[Trip]:
        """Every trip that fits, the newest first, page by page as they are asked for."""
        async for page in self.trip_pages(**query):
            for trip in page.data:
                yield trip

    async def trip_pages(
        self,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        key: str | None = None,
        policy: str | None = None,
        phase: Phase | None = None,
        probe: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> AsyncIterator[TripPage]:
        """Pages of the trips that fit; for admins."""
        query = _trip_query(since, until, key, policy, phase, probe, limit)
        while True:
            params = query if cursor is None else query | {"cursor": cursor}
            page = await self._client.get(
                "/breaker/trips", cast_to=TripPage, options={"params": params}
            )
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    async def what_if(
        self,
        *,
        threshold: float | None = None,
        target_fpr: float | None = None,
        days: int | None = None,
    ) -> WhatIf:
        """What other thresholds would have done to the requests of the last days; for admins."""
        params = _what_if_query(threshold, target_fpr, days)
        return await self._client.get(
            "/breaker/what-if", cast_to=WhatIf, options={"params": params}
        )

    async def reload(self) -> ReloadedPolicies:
        """Makes the server read its policy file again; for admins."""
        return await self._client.post("/breaker/reload", cast_to=ReloadedPolicies)


def _no_breaker(error: openai.NotFoundError) -> UnguardedError:
    return UnguardedError(f"HTTP 404 on {error.request.url.path}: no breaker")


def _checked(answer: object) -> Breaker:
    """An answer that names a breaker; a catch-all route may say 200 to anything."""
    # openai's models are not validated, and what is no JSON is given out as text.
    if (
        not isinstance(answer, Breaker)
        or field_of(answer, "object") != "breaker"
        or not isinstance(field_of(answer, "digest"), str)
    ):
        raise UnguardedError("something else than a breaker on /breaker")
    return answer


def _trip_query(
    since: datetime | str | None,
    until: datetime | str | None,
    key: str | None,
    policy: str | None,
    phase: Phase | None,
    probe: str | None,
    limit: int | None,
) -> dict[str, object]:
    times = {"since": since, "until": until}
    asked = {
        **{n: t.isoformat() if isinstance(t, datetime) else t for n, t in times.items()},
        **{"key": key, "policy": policy, "phase": phase, "probe": probe, "limit": limit},
    }
    return _given(asked)


def _what_if_query(
    threshold: float | None, target_fpr: float | None, days: int | None
) -> dict[str, object]:
    if (threshold is None) == (target_fpr is None):
        raise ValueError("got threshold and target_fpr, or neither, expected one; pass one")
    return _given({"threshold": threshold, "target_fpr": target_fpr, "days": days})


def _given(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
