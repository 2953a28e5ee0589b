"""Who may run, who waits, who is turned away: limits in all and of each key.

    admit ──► waiting (its body comes in) ──► start: in line ──► running ──► out
       │         └── queue full, time over, server stops: 503       └── time over: 504
       └── rate limit: 429, queue full: 503, server stops: 503

Within a key the line is first in, first out; the keys take turns. A full house turns away the
newcomer, unless another key has more waiting: then that key's last one goes. So a key with many
requests can neither starve nor shut out another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.refusals import (
    queue_full,
    queue_timeout,
    rate_headers,
    request_timeout,
    shutting_down,
    too_fast,
)
from circuit_breakers.api.token_bucket import TokenBucket
from circuit_breakers.policies.limits import KeyLimits
from circuit_breakers.settings import ServeSettings

__all__ = ["Admission", "Limits", "Ticket"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one key may do; None is no limit of its own."""

    max_concurrent: int | None = None
    """Requests that run at once."""
    requests_per_minute: int | None = None
    """Rate."""
    burst: int | None = None
    """Requests that may come at once after a pause; None: a minute's."""
    request_timeout_s: float | None = None
    """From a request's arrival to the end of its answer."""

    @classmethod
    def from_settings(cls, settings: ServeSettings) -> Limits:
        """Those of a key that has none of its own."""
        return cls(
            max_concurrent=settings.max_concurrent_requests_per_key,
            requests_per_minute=settings.requests_per_minute,
            request_timeout_s=settings.request_timeout_s,
        )

    def of_key(self, own: KeyLimits | None) -> Limits:
        """These, with what a key has of its own in their place."""
        if own is None:
            return self
        return replace(self, **own.model_dump(exclude_none=True))


class Ticket:
    """One request's place, which `Admission.admit` gives and takes back."""

    def __init__(self, admission: Admission, account: _Account, limits: Limits) -> None:
        self._admission = admission
        self.account = account
        self.limits = limits
        self.headers: dict[str, str] = {}
        """What the answer says of the rate limit."""
        self.is_running = False
        self.turn: asyncio.Future[None] | None = None
        """Set while the request is in line, and done once it may run."""
        self.clock: asyncio.Timeout | None = None
        self.ended_by: ApiError | None = None

    async def start(self) -> None:
        """Returns when the request may run; its body should have come in by then.

        Raises:
            ApiError: the request has been ended, and is about to be cancelled.
        """
        if self.ended_by is not None:
            raise self.ended_by
        if not self.is_running:
            await self._admission._wait_in_line(self)

    def end(self, error: ApiError) -> None:
        """Cancels whatever the request is doing; `admit` then raises `error`."""
        if self.ended_by is None and self.clock is not None and not self.clock.expired():
            self.ended_by = error
            self.clock.reschedule(asyncio.get_running_loop().time())

    def why_ended(self) -> ApiError:
        """The error of a request whose clock has run out."""
        if self.ended_by is not None:
            return self.ended_by
        time_s = self.limits.request_timeout_s
        assert time_s is not None, "no time, no end of it"
        return request_timeout(time_s) if self.is_running else queue_timeout(time_s)


@dataclass(eq=False)
class _Account:
    """What one key has in the house."""

    key_id: str
    num_running: int = 0
    waiting: dict[Ticket, None] = field(default_factory=dict)
    """Not running yet, the oldest first; those in line and those whose body is still coming in."""
    line: deque[Ticket] = field(default_factory=deque)
    bucket: TokenBucket | None = None

    @property
    def num_inside(self) -> int:
        return self.num_running + len(self.waiting)

    def next_may_run(self) -> bool:
        most = self.line[0].limits.max_concurrent
        return most is None or self.num_running < most


class Admission:
    """The house: at most `max_concurrent` requests run, and `max_queued` wait beyond those.

    An account is kept for each key that ever came, so a key_id must come from a closed set.
    """

    def __init__(
        self,
        *,
        max_concurrent: int,
        max_queued: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._clock_s = clock_s
        self._accounts: dict[str, _Account] = {}
        self._in_line: dict[str, _Account] = {}
        """Accounts with someone in line, the one whose turn it is first."""
        self._inside: dict[Ticket, None] = {}
        self._num_running = 0
        self._is_open = True
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._inside) - self._num_running

    @asynccontextmanager
    async def admit(self, key_id: str, limits: Limits) -> AsyncIterator[Ticket]:
        """A place for one request, given back however its handling ends.

        Raises:
            ApiError: 429 or 503 when there is none; 503 or 504 when the time of the request is
                over, after what runs inside was cancelled.
        """
        ticket = self._enter(key_id, limits)
        try:
            async with asyncio.timeout(limits.request_timeout_s) as ticket.clock:
                yield ticket
        except TimeoutError as e:
            assert ticket.clock is not None, "it was just entered"
            if not ticket.clock.expired():
                raise
            raise ticket.why_ended() from e
        finally:
            ticket.clock = None
            self._leave(ticket)

    def close(self) -> None:
        """Turns every further request away; those inside stay."""
        self._is_open = False

    def end_all(self, error: ApiError) -> None:
        """Ends every request inside with `error`, or the error event of its stream."""
        for ticket in list(self._inside):
            ticket.end(error)

    async def empty(self) -> None:
        """Returns when no request is inside."""
        await self._empty.wait()

    def _enter(self, key_id: str, limits: Limits) -> Ticket:
        if not self._is_open:
            raise shutting_down()
        account = self._accounts.setdefault(key_id, _Account(key_id))
        bucket = _bucket(account, limits)
        now_s = self._clock_s()
        if bucket is not None and bucket.token_in_s(now_s) > 0:
            raise too_fast(bucket, now_s)
        self._make_room(account, limits)
        ticket = Ticket(self, account, limits)
        if bucket is not None:
            bucket.take(now_s)
            ticket.headers = rate_headers(bucket, now_s)
        account.waiting[ticket] = None
        self._inside[ticket] = None
        self._empty.clear()
        return ticket

    def _make_room(self, account: _Account, limits: Limits) -> None:
        own = limits.max_concurrent
        if own is not None and account.num_inside >= own + self._max_queued:
            raise queue_full()
        if len(self._inside) < self._max_concurrent + self._max_queued:
            return
        longest = max(self._accounts.values(), key=lambda a: len(a.waiting))
        if len(longest.waiting) <= len(account.waiting) + 1:
            raise queue_full()
        last = next(reversed(longest.waiting))
        last.end(queue_full())
        self._leave(last)

    async def _wait_in_line(self, ticket: Ticket) -> None:
        assert ticket.turn is None and ticket in self._inside, "a ticket is for one request, once"
        ticket.turn = asyncio.get_running_loop().create_future()
        account = ticket.account
        account.line.append(ticket)
        self._in_line.setdefault(account.key_id, account)
        self._let_in()
        await ticket.turn

    def _let_in(self) -> None:
        while self._num_running < self._max_concurrent:
            account = next((a for a in self._in_line.values() if a.next_may_run()), None)
            if account is None:
                return
            ticket = account.line.popleft()
            # To the end: the other keys come first now.
            del self._in_line[account.key_id]
            if account.line:
                self._in_line[account.key_id] = account
            del account.waiting[ticket]
            account.num_running += 1
            self._num_running += 1
            ticket.is_running = True
            assert ticket.turn is not None, "it was in line"
            if not ticket.turn.done():  # cancelled in this very step; it leaves in a moment
                ticket.turn.set_result(None)

    def _leave(self, ticket: Ticket) -> None:
        """Gives the place back; a second time changes nothing."""
        if ticket not in self._inside:
            return
        del self._inside[ticket]
        account = ticket.account
        if ticket.is_running:
            account.num_running -= 1
            self._num_running -= 1
        else:
            del account.waiting[ticket]
            if ticket.turn is not None:
                account.line.remove(ticket)
                if not account.line:
                    del self._in_line[account.key_id]
        if not self._inside:
            self._empty.set()
        self._let_in()


def _bucket(account: _Account, limits: Limits) -> TokenBucket | None:
    """The key's bucket, at the rate that holds now; None without one."""
    rate = limits.requests_per_minute
    if rate is None:
        account.bucket = None
    elif account.bucket is None:
        account.bucket = TokenBucket(rate, limits.burst)
    else:
        account.bucket.per_minute, account.bucket.burst = rate, limits.burst
    return account.bucket
