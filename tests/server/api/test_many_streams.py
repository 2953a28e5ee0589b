"""Hundreds of streams open at once through the real HTTP stack, each with a guard of its own."""

from __future__ import annotations

import asyncio
import json

import httpx
import psutil

from .scripted import Scripted, scripted_server
from .scripted_engine import EngineServing

NUM_STREAMS, NUM_TRIPPING = 200, 20
NUM_TOKENS, TRIPS_AT = 20, 11


def test_every_stream_of_200_is_delivered_scored_and_closed() -> None:
    asyncio.run(_hold_200())


async def _hold_200() -> None:
    serving = EngineServing()
    process = psutil.Process()
    async with scripted_server(serving, max_concurrent_requests=NUM_STREAMS) as server:
        # Also loads what is loaded by a first request only.
        assert (await server.http.get("/livez")).status_code == 200
        num_fds = process.num_fds()
        # One client each: none waits for another's connection.
        limits = httpx.Limits(max_connections=None)
        url = server.http.base_url
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            streams = [
                asyncio.create_task(_read(client, TRIPS_AT if i < NUM_TRIPPING else None))
                for i in range(NUM_STREAMS)
            ]
            async with asyncio.timeout(60):
                while serving.engine.num_open < NUM_STREAMS:
                    await asyncio.sleep(0.01)
            assert server.service.admission.num_running == NUM_STREAMS
            assert process.num_fds() >= num_fds + NUM_STREAMS
            serving.engine.gate.set()
            ends = await asyncio.gather(*streams)
        assert ends == [
            ("x" * TRIPS_AT, "content_filter", True) if i < NUM_TRIPPING
            # Its last token has a score too: it was scripted with one.
            else ("x" * NUM_TOKENS, "stop", False)
            for i in range(NUM_STREAMS)
        ]  # fmt: skip
        await server.nothing_left()
        async with asyncio.timeout(20):
            while process.num_fds() > num_fds:
                await asyncio.sleep(0.01)
        assert server.outcomes("ok") == NUM_STREAMS - NUM_TRIPPING
        assert server.outcomes("tripped_completion") == NUM_TRIPPING
        for name in ("unscored", "leaked"):
            assert _count(server, f"circuit_breakers_{name}_tokens_total") == 0
        assert _count(server, "circuit_breakers_score_count", phase="completion") == NUM_STREAMS


async def _read(client: httpx.AsyncClient, trips_at: int | None) -> tuple[str, str, bool]:
    """Text, finish reason and whether the guard reports a trip, of a stream that ends whole."""
    body = {"stream": True, "num_events": NUM_TOKENS, "trips_at": trips_at, "held": True}
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = [line async for line in response.aiter_lines() if line]
    assert events.pop() == "data: [DONE]"
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        text += choice["delta"]["content"]
    return text, choice["finish_reason"], choice["guard"]["tripped"]


def _count(server: Scripted, name: str, **labels: str) -> float | None:
    return server.service.registry.get_sample_value(name, labels)
