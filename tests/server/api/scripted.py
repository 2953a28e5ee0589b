"""Our own app and server with a script in the engine's place: what streams, and for how long.

Started as a program it is `circuit-breakers serve` in all but the engine, ready in two seconds:

    python scripted.py --port 8000 --shutdown-timeout-s 3
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.connection import http_server
from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.responses import DONE, StreamShape
from circuit_breakers.api.service import Service
from circuit_breakers.guard.policy import Policy
from circuit_breakers.settings import ServeSettings, load_settings

__all__ = ["Scripted", "ScriptedServing", "scripted_server", "serve_script"]


class ScriptedCall:
    """What a request asks of the script."""

    endpoint = "chat"
    prompt_field = "messages"
    num_prompts = 1
    format = ENDPOINTS["chat"].format
    annotators = ()
    final_usage = None

    def __init__(
        self,
        *,
        stream: bool = False,
        num_events: int = 1,
        num_chars: int = 1,
        pause_s: float = 0.0,
        kills: bool = False,
    ) -> None:
        self.streams = stream
        self.num_events = num_events
        self.text = "x" * num_chars
        self.pause_s = pause_s
        self.kills = kills
        """The engine dies of it."""
        self.shape = StreamShape(
            id="chatcmpl-1", object="chat.completion.chunk", model="m", num_choices=1
        )

    def prompts_of(self, choices: set[int]) -> set[int]:
        return {0}  # nobody judges it

    def usage(self) -> None:
        return None


class ScriptedServing:
    """Takes the part of `Serving`: says "x" `num_events` times, each after a pause."""

    def __init__(self) -> None:
        self.num_started = 0
        self.num_open = 0
        """Answers that the engine is still at work on."""
        breaker = SimpleNamespace(
            manifest=SimpleNamespace(
                name="scripted",
                base_model=SimpleNamespace(id="m"),
                created=SimpleNamespace(timestamp=lambda: 0.0),
                probes=(),
            ),
            digest="d" * 64,
        )
        policy = Policy(breaker="scripted", probes=(), mode="enforce")
        self.guarded = SimpleNamespace(
            breaker=breaker, policy=policy, mode="enforce", errored=False, loras={}
        )

    breaker_name = "scripted"

    def parse(self, endpoint: str, data: dict[str, Any], *, max_choices: int) -> ScriptedCall:
        return ScriptedCall(**data)

    async def start(self, call: ScriptedCall) -> dict[str, Any] | AsyncGenerator[str, None]:
        self.num_started += 1
        if call.kills:
            self.guarded.errored = True
        if call.streams:
            return self._events(call)
        self.num_open += 1
        try:
            await asyncio.sleep(call.num_events * call.pause_s)
        finally:
            self.num_open -= 1
        return {"choices": [{"index": 0, "finish_reason": "stop"}]}

    async def _events(self, call: ScriptedCall) -> AsyncGenerator[str, None]:
        self.num_open += 1
        try:
            for i in range(call.num_events):
                end = '"stop"' if i == call.num_events - 1 else "null"
                yield (
                    f'data: {{"choices":[{{"index":0,"delta":{{"content":"{call.text}"}},'
                    f'"finish_reason":{end}}}]}}\n\n'
                )
                await asyncio.sleep(call.pause_s)
            yield DONE
        finally:
            self.num_open -= 1


class Scripted(NamedTuple):
    """A running server of this process's own event loop."""

    service: Service
    serving: ScriptedServing
    port: int
    http: httpx.AsyncClient

    async def post(self, **script: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=script)

    def refusals(self, reason: str) -> float:
        name = "circuit_breakers_refused_requests_total"
        return self.service.registry.get_sample_value(name, {"reason": reason}) or 0.0

    def outcomes(self, outcome: str) -> float:
        name = "circuit_breakers_requests_total"
        labels = {"model": self.service.settings.model_name, "policy": "default"}
        return self.service.registry.get_sample_value(name, labels | {"outcome": outcome}) or 0.0

    async def nothing_left(self) -> None:
        """Passes once every place and every answer of the engine has been given back."""
        async with asyncio.timeout(10):
            while self.serving.num_open or self.service.admission.num_inside:
                await asyncio.sleep(0.01)
        assert self.service.admission.num_running == 0
        assert self.service.admission.num_waiting == 0


@asynccontextmanager
async def scripted_server(
    serving: ScriptedServing | None = None, **settings: Any
) -> AsyncIterator[Scripted]:
    """A server with these settings, on a port of its own."""
    serving = serving or ScriptedServing()
    app: FastAPI = create_app(
        ServeSettings(**settings),
        CollectorRegistry(),
        serving,  # type: ignore[arg-type]
    )
    service: Service = app.state.service
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = http_server(app, timeout_s=service.settings.body_timeout_s)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=20
    ) as http:
        yield Scripted(service, serving, port, http)
    server.should_exit = True
    await running


def serve_script(serving: ScriptedServing) -> None:
    """Runs `circuit-breakers serve` on a script, with the options of this process."""
    from circuit_breakers.api import lifecycle

    async def start(service: Service, settings: ServeSettings, stack: AsyncExitStack) -> None:
        service.attach(serving)  # type: ignore[arg-type]
        service.ready()

    lifecycle._start = start
    lifecycle._ready_lines = lambda service, listener: json.dumps(listener.getsockname()[1])
    names = [word.removeprefix("--").replace("-", "_") for word in sys.argv[1::2]]
    flags: dict[str, Any] = dict(zip(names, sys.argv[2::2], strict=True))
    lifecycle.serve(load_settings(**flags), lambda line: print(line, flush=True))


if __name__ == "__main__":
    serve_script(ScriptedServing())
