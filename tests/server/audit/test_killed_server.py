"""kill -9 of a whole server with an audit log: what was on the disk is in the log, once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from typer.testing import CliRunner

from circuit_breakers.cli import app

ROOT = Path(__file__).parents[3]
WAIT_S = 60
NUM_IN_DATABASE, NUM_IN_SPOOL, NUM_OPEN = 10, 10, 5
TRIPPING = {"num_events": 4, "trips_at": 2}
ENDLESS = {"stream": True, "num_events": 100_000, "pause_s": 0.05}


@contextmanager
def server(database: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`serve` on a script for an engine: app, guard, audit log and process are real."""
    paths = [str(ROOT), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.server.api.scripted_engine"),
            *("--port", "0", "--audit-db", str(database), "--shutdown-timeout-s", "10"),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{json.loads(process.stdout.readline())}"
            with httpx.Client(base_url=url, timeout=WAIT_S) as http:
                yield process, http
        finally:
            process.kill()


def trip(http: httpx.Client) -> str:
    """Id of a request that tripped."""
    answer = http.post("/v1/chat/completions", json=TRIPPING)
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
    return answer.headers["x-request-id"]


def trips_in(database: Path) -> list[str]:
    """Ids of the requests whose trips are in the log, in its order."""
    with contextlib.closing(sqlite3.connect(database, timeout=WAIT_S)) as db:
        rows = db.execute("SELECT request_id FROM audit_log WHERE kind = 'trip' ORDER BY seq")
        return [request_id for (request_id,) in rows]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_is_killed_loses_no_trip_and_breaks_no_chain(tmp_path: Path) -> None:
    database = tmp_path / "audit.db"
    spool = tmp_path / "audit.db.spool"
    with server(database) as (process, http):
        stored = [trip(http) for _ in range(NUM_IN_DATABASE)]
        wait_until(lambda: trips_in(database) == stored)
        # The database is away now, as in a long transaction of somebody else's.
        holder = sqlite3.connect(database, isolation_level=None, timeout=WAIT_S)
        holder.execute("BEGIN EXCLUSIVE")
        spooled = [trip(http) for _ in range(NUM_IN_SPOOL)]

        def on_disk() -> bool:
            written = b"".join(file.read_bytes() for file in spool.iterdir())
            return all(request_id.encode() in written for request_id in spooled)

        wait_until(on_disk)
        # The kill falls into running streams, and into further trips.
        with contextlib.ExitStack() as streams:
            for _ in range(NUM_OPEN):
                opened = streams.enter_context(
                    http.stream("POST", "/v1/chat/completions", json=ENDLESS)
                )
                assert opened.status_code == 200
            in_flight: list[str] = []
            busy = threading.Thread(target=_trip_to_the_end, args=(http, in_flight))
            busy.start()
            wait_until(lambda: len(in_flight) > 0)
            process.send_signal(signal.SIGKILL)
            busy.join()
        process.wait()
        holder.close()
    with server(database) as (process, http):
        wait_until(lambda: set(stored + spooled) <= set(trips_in(database)))
        newer = trip(http)
        wait_until(lambda: newer in trips_in(database))
        process.terminate()
        assert process.wait(WAIT_S) == 0
    logged = trips_in(database)
    assert len(set(logged)) == len(logged)
    assert logged[: NUM_IN_DATABASE + NUM_IN_SPOOL] == stored + spooled
    assert set(in_flight) <= set(logged), "a client was told of a trip that the log has not"
    verdict = CliRunner().invoke(app, ["audit", "verify", "--db", str(database)])
    assert verdict.exit_code == 0, verdict.output
    # The log's creation, two starts, and the trips.
    assert f"ok: {len(logged) + 3} rows, each as it was written" in verdict.stdout


def _trip_to_the_end(http: httpx.Client, ids: list[str]) -> None:
    with contextlib.suppress(httpx.TransportError):
        while True:
            ids.append(trip(http))
