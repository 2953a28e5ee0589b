"""openai's clients, for a server that runs a circuit breaker.

    request -> server has a breaker? (once, before the first stream) -> openai -> report -> caller

Whatever openai's clients can be called with works as it does there; so do retries and timeouts.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any, Self, TypeVar

import openai

from circuit_breakers_client.answers import OnTrip, Rules, is_guarded
from circuit_breakers_client.breaker import AsyncBreakerResource, BreakerResource
from circuit_breakers_client.openai_hooks import ParsingHook
from circuit_breakers_client.streams import (
    AsyncGuardedStream,
    GuardedStream,
    guarded_stream_class,
)

__all__ = ["AsyncCircuitBreakers", "CircuitBreakers"]

_ARGUMENTS = """

    Args:
        on_trip: "return" hands a stopped answer out as the server gives it: finish reason
            content_filter, or openai.BadRequestError for a prompt. "raise" raises TrippedError for
            both; in a stream, in place of the chunk that ends the choice that was stopped.
        require_guard: an answer without a guard report raises UnguardedError and is withheld. A
            stream is not begun where GET /v1/breaker finds no breaker.
        arguments: openai's own. base_url, or OPENAI_BASE_URL, must be given: a prompt that is meant
            for a guarded server should not go to OpenAI by default.
    Raises:
        ValueError: for an unknown on_trip, or without a base URL.
"""


class CircuitBreakers(ParsingHook, openai.OpenAI):
    __doc__ = "openai.OpenAI with a guard report on every answer." + _ARGUMENTS

    def __init__(
        self, *, on_trip: OnTrip = "return", require_guard: bool = True, **arguments: Any
    ) -> None:
        self._rules = _rules(on_trip, require_guard, arguments)
        self._has_breaker = False
        super().__init__(**arguments)

    @cached_property
    def breaker(self) -> BreakerResource:
        """The breaker that is live, and what operators can ask of it."""
        return BreakerResource(self)

    def copy(
        self, *, on_trip: OnTrip | None = None, require_guard: bool | None = None, **changes: Any
    ) -> Self:
        """A client with other options, this package's or openai's."""
        return _adopt(self, super().copy(**changes), on_trip, require_guard)

    with_options = copy

    def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Sends one request; everything that openai's methods ask goes through here."""
        generates = is_guarded(options.method, options.url)
        if generates and stream:
            if self._rules.require_guard and not self._has_breaker:
                self.breaker.retrieve()
                self._has_breaker = True
            stream_cls = guarded_stream_class(GuardedStream, stream_cls)
        try:
            answer = super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
        except openai.BadRequestError as error:
            self._rules.check_error(error)
            raise
        return _not_text(answer, self._rules) if generates else answer


class AsyncCircuitBreakers(ParsingHook, openai.AsyncOpenAI):
    __doc__ = "openai.AsyncOpenAI with a guard report on every answer." + _ARGUMENTS

    def __init__(
        self, *, on_trip: OnTrip = "return", require_guard: bool = True, **arguments: Any
    ) -> None:
        self._rules = _rules(on_trip, require_guard, arguments)
        self._has_breaker = False
        super().__init__(**arguments)

    @cached_property
    def breaker(self) -> AsyncBreakerResource:
        """The breaker that is live, and what operators can ask of it."""
        return AsyncBreakerResource(self)

    def copy(
        self, *, on_trip: OnTrip | None = None, require_guard: bool | None = None, **changes: Any
    ) -> Self:
        """A client with other options, this package's or openai's."""
        return _adopt(self, super().copy(**changes), on_trip, require_guard)

    with_options = copy

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Sends one request; everything that openai's methods ask goes through here."""
        generates = is_guarded(options.method, options.url)
        if generates and stream:
            if self._rules.require_guard and not self._has_breaker:
                await self.breaker.retrieve()
                self._has_breaker = True
            stream_cls = guarded_stream_class(AsyncGuardedStream, stream_cls)
        try:
            answer = await super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
        except openai.BadRequestError as error:
            self._rules.check_error(error)
            raise
        return _not_text(answer, self._rules) if generates else answer


Client = TypeVar("Client", bound=CircuitBreakers | AsyncCircuitBreakers)


def _rules(on_trip: OnTrip, require_guard: bool, arguments: dict[str, Any]) -> Rules:
    if on_trip not in ("return", "raise"):
        raise ValueError(f"got on_trip {on_trip!r}, expected 'return' or 'raise'; change it")
    if not arguments.get("base_url") and not os.environ.get("OPENAI_BASE_URL"):
        raise ValueError(
            "got no base URL, expected the guarded server's; pass base_url="
            "'http://HOST:8000/v1', or set OPENAI_BASE_URL"
        )
    return Rules(on_trip, require_guard)


def _adopt(old: Client, new: Client, on_trip: OnTrip | None, require_guard: bool | None) -> Client:
    """`new`, a copy by openai, with the rules of `old` and changes to them."""
    new._rules = _rules(
        old._rules.on_trip if on_trip is None else on_trip,
        old._rules.require_guard if require_guard is None else require_guard,
        {"base_url": new.base_url},
    )
    new._has_breaker = old._has_breaker and new.base_url == old.base_url
    return new


def _not_text(answer: Any, rules: Rules) -> Any:
    # openai gives what is no JSON out as it is, without parsing.
    if isinstance(answer, str):
        rules.miss("an answer that is no JSON")
    return answer
