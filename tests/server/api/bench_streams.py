"""What an open stream costs in memory: many at once through the real server, on a scripted engine.

    PYTHONPATH=server python -m tests.server.api.bench_streams --streams 1000

The server is a process of its own with uvicorn, limits, GuardedEngine and a policy's state machine
for each stream; what vLLM itself keeps of a request comes on top. Every stream is held open until
all have their first token. Exits with 1 unless each one ends whole, with its guard report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from circuit_breakers.api.responses import DONE

NUM_TOKENS = 20
WARM_UP = 50
"""Streams before the first measurement, for what is loaded and kept once."""
ROOT = Path(__file__).parents[3]


class Open(NamedTuple):
    """An answer after its first token."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    start: bytes

    async def rest(self) -> bytes:
        """All of it."""
        said = self.start + await self.reader.read()
        self.writer.close()
        return said


async def post(port: int, script: dict[str, Any]) -> Open:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(script).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return Open(reader, writer, await reader.readuntil(b'"content":"x"'))


async def hold(port: int, num_streams: int, server: psutil.Process) -> tuple[int, int]:
    """Streams that came in whole, and the server's resident bytes while all were open."""
    held = {"stream": True, "num_events": NUM_TOKENS, "held": True}
    streams = [await post(port, held) for _ in range(num_streams)]
    resident: int = server.memory_info().rss
    assert await (await post(port, {"num_events": 1, "releases": True})).rest()
    return sum([is_whole(await stream.rest()) for stream in streams]), resident


def is_whole(said: bytes) -> bool:
    has_passed = b'"tripped":false' in said and b'"tripped":true' not in said
    return has_passed and said.count(b'"content":"x"') == NUM_TOKENS and DONE.encode() in said


async def main(num_streams: int) -> int:
    command = [
        *(sys.executable, "-m", "tests.server.api.scripted_engine", "--port", "0"),
        *("--max-concurrent-requests", str(num_streams + WARM_UP)),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            server = psutil.Process(process.pid)
            await hold(port, WARM_UP, server)
            before = server.memory_info().rss
            num_whole, during = await hold(port, num_streams, server)
        finally:
            process.terminate()
    print(
        f"{num_whole} of {num_streams} streams whole, each scored; resident {before / 2**20:.1f} "
        f"MiB before, {during / 2**20:.1f} MiB with all open: "
        f"{(during - before) / num_streams / 1024:.1f} KiB a stream"
    )
    return 0 if num_whole == num_streams else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of open streams.")
    parser.add_argument("--streams", type=int, default=1000)
    sys.exit(asyncio.run(main(parser.parse_args().streams)))
