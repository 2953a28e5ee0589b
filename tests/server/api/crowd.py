"""Requests that come, run and leave, for tests of admission."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from circuit_breakers.api.admission import Admission, Limits
from circuit_breakers.api.errors import ApiError

__all__ = ["FREE", "Crowd", "house", "run", "settle"]

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
