"""The faults. Each is done to a running server under traffic, and says how the server came through.

A fault leaves a server behind that is ready.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from . import disk
from .house import House, wait_until
from .slow_clients import slow_clients

__all__ = ["FAULTS", "REMOVED", "Fault"]

_OUTAGE_S = 20.0
_LIBFAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
_END_S = 120
REMOVED = "removed-"
"""Before the name of a log that was moved away."""
NUM_SLOW = 200
NUM_RESTARTS = 5


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    """At the command line."""
    means: str
    """For the table."""
    do: Callable[[House], str]
    """Makes and mends it; how the server came through."""
    spares_clients: bool = False
    """Nobody but who is its cause may notice."""
    arguments: tuple[str, ...] = ()
    """Of the server that it wants."""
    env: Callable[[House], dict[str, str]] = lambda house: {}
    num_clients: int = 6
    log_is_cut: bool = False
    """The fault is a tampering with the log, which `audit verify` has to find."""


def _engine_core(house: House) -> psutil.Process:
    (core,) = _python_children(house.processes()[0])
    return core


def _worker(house: House) -> psutil.Process:
    (worker,) = _python_children(_engine_core(house))
    return worker


def _python_children(process: psutil.Process) -> list[psutil.Process]:
    """Those that multiprocessing has spawned, without its own helpers."""
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def _killed(victim: Callable[[House], psutil.Process]) -> Callable[[House], str]:
    def do(house: House) -> str:
        engine = house.processes()[1:]
        victim(house).kill()
        began_s = time.monotonic()
        exit_code = house.server.process.wait(_END_S)
        ended_s = time.monotonic() - began_s
        house.expect("exit code", exit_code, 1)
        left = _left(house, engine)
        return f"exit {exit_code} after {ended_s:.1f} s, {left}; {_restarted(house)}"

    return do


def _left(house: House, engine: list[psutil.Process]) -> str:
    """How many processes of the engine have outlived their server; none after this."""
    _, alive = psutil.wait_procs(engine, timeout=_END_S)
    for process in alive:
        process.kill()
    house.expect("processes left", len(alive), 0)
    return f"{len(alive)} processes left"


def _restarted(house: House) -> str:
    began_s = time.monotonic()
    house.start()
    return f"ready {time.monotonic() - began_s:.0f} s after the next start"


def _kill_api(house: House) -> str:
    engine = house.processes()[1:]
    house.server.process.kill()
    house.server.process.wait()
    return f"{_left(house, engine)}; {_restarted(house)}"


def _lock(house: House) -> str:
    holder = sqlite3.connect(house.database, isolation_level=None, timeout=60)
    with contextlib.closing(holder):
        holder.execute("BEGIN EXCLUSIVE")
        time.sleep(_OUTAGE_S)
        waiting = house.server.samples()["circuit_breakers_audit_spooled"]
        holder.execute("ROLLBACK")
    return f"{waiting:.0f} entries waited in the spool; {_caught_up(house)}"


def _remove(house: House) -> str:
    for file in house.log.glob("audit.db*"):
        if file.is_file():
            file.rename(file.with_name(f"{REMOVED}{file.name}"))
    time.sleep(_OUTAGE_S)
    return f"a new log was begun; {_caught_up(house)}"


def _forbid_writing(house: House) -> str:
    with disk.nothing_written(house.server.process.pid):
        time.sleep(_OUTAGE_S)
        waiting = house.server.samples()["circuit_breakers_audit_spooled"]
    return f"{waiting:.0f} entries waited in memory; {_caught_up(house)}"


def _fill_disk(house: House) -> str:
    assert house.has_small_disk, "only root may mount a tmpfs; 'audit-unwritable' needs none"
    with disk.full(house.log):
        time.sleep(_OUTAGE_S)
        waiting = house.server.samples()["circuit_breakers_audit_spooled"]
    return f"{waiting:.0f} entries waited in memory; {_caught_up(house)}"


def _caught_up(house: House) -> str:
    began_s = time.monotonic()
    wait_until(lambda: house.server.samples()["circuit_breakers_audit_spooled"] < 10)
    dropped = house.server.samples()["circuit_breakers_audit_dropped_total"]
    house.expect("dropped entries", dropped, 0)
    return f"written {time.monotonic() - began_s:.1f} s after it ended, {dropped:.0f} dropped"


def _slow(house: House) -> str:
    api = house.processes()[0]
    before = api.memory_info().rss
    num_before = house.server.samples()["circuit_breakers_requests_total"]
    with slow_clients(house.server.url, NUM_SLOW) as slow:
        wait_until(lambda: house.server.samples()["circuit_breakers_running_requests"] >= NUM_SLOW)
        peak = before
        began_s = time.monotonic()
        while house.server.samples()["circuit_breakers_running_requests"] > 10:
            slow.read_for(2)
            peak = max(peak, api.memory_info().rss)
            assert time.monotonic() - began_s < 1200, "they hold their places for ever"
        took_s = time.monotonic() - began_s
        num_served = house.server.samples()["circuit_breakers_requests_total"] - num_before
        num_whole = slow.num_whole()
    house.expect("whole answers to slow clients", num_whole, NUM_SLOW)
    return (
        f"{NUM_SLOW} at 1 byte/s held places for {took_s:.0f} s, {num_whole} got whole answers; "
        f"{(peak - before) / 2**20:.0f} MiB at the peak; {num_served:.0f} requests ended meanwhile"
    )


def _jump(house: House) -> str:
    clock = _clock_file(house)
    told = []
    for offset in ("+1d", "-1d", "+0"):
        # Replaced whole: the server's threads read it at any moment.
        new = clock.with_name("clock.new")
        new.write_text(offset)
        new.rename(clock)
        time.sleep(_OUTAGE_S)
        with contextlib.closing(sqlite3.connect(house.database, timeout=60)) as db:
            (newest_us,) = db.execute(
                "SELECT time_us FROM audit_log ORDER BY seq DESC LIMIT 1"
            ).fetchone()
        told.append(f"{offset}: {(newest_us / 1e6 - time.time()) / 3600:+.1f} h")
    ready = httpx.get(f"{house.server.url}/readyz", timeout=20).status_code
    house.expect("/readyz", ready, 200)
    return f"the newest entry's time against this clock: {', '.join(told)}; /readyz {ready}"


def _clock_file(house: House) -> Path:
    return house.root / "clock"


def _fake_clock(house: House) -> dict[str, str]:
    """The environment of a server whose wall clock is moved by a file."""
    assert Path(_LIBFAKETIME).is_file(), "apt-get install faketime"
    _clock_file(house).write_text("+0")
    return {
        "LD_PRELOAD": _LIBFAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(_clock_file(house)),
        "FAKETIME_CACHE_DURATION": "1",
        # As when a clock is set: the monotonic one goes on.
        "DONT_FAKE_MONOTONIC": "1",
        # Else waits with a time limit return at once, and Python's threads do nothing but wait.
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
    }


def _overload(house: House) -> str:
    time.sleep(60)
    series = house.server.samples()
    return (
        f"queue {series['circuit_breakers_waiting_requests']:.0f}, running "
        f"{series['circuit_breakers_running_requests']:.0f} at the end"
    )


def _restart_loop(house: House) -> str:
    exits, took = [], []
    for _ in range(NUM_RESTARTS):
        time.sleep(5)
        exits.append(house.server.leave())
        began_s = time.monotonic()
        house.start()
        took.append(time.monotonic() - began_s)
    house.expect("exit codes", exits, [0] * NUM_RESTARTS)
    return (
        f"exit codes {exits}; ready after {statistics.median(took):.0f} s "
        f"({min(took):.0f} to {max(took):.0f})"
    )


FAULTS = (
    Fault(
        name="audit-locked",
        means="audit database locked for 20 s by another process",
        do=_lock,
        spares_clients=True,
    ),
    Fault(
        name="audit-unwritable",
        means="no file takes a byte for 20 s (RLIMIT_FSIZE)",
        do=_forbid_writing,
        spares_clients=True,
    ),
    Fault(
        name="disk-full",
        means="disk of audit log and spool full for 20 s (ENOSPC)",
        do=_fill_disk,
        spares_clients=True,
    ),
    Fault(
        name="slow-clients",
        means="200 clients that read 1 byte a second",
        do=_slow,
        spares_clients=True,
    ),
    Fault(
        name="kill-api",
        means="kill -9 of the API process, restart over the same log",
        do=_kill_api,
    ),
    Fault(
        name="kill-engine-core",
        means="kill -9 of the engine core, restart",
        do=_killed(_engine_core),
    ),
    Fault(
        name="kill-worker",
        means="kill -9 of the worker, restart",
        do=_killed(_worker),
    ),
    Fault(
        name="overload",
        means="32 clients for 8 places, 8 more in line",
        do=_overload,
        arguments=("--max-concurrent-requests", "8", "--max-queued-requests", "8"),
        num_clients=32,
    ),
    Fault(
        name="clock-jump",
        means="wall clock a day ahead, a day back, and right again (libfaketime)",
        do=_jump,
        spares_clients=True,
        env=_fake_clock,
    ),
    Fault(name="restart-loop", means="5 times SIGTERM and start", do=_restart_loop),
    Fault(
        name="audit-removed",
        means="audit database moved away",
        do=_remove,
        spares_clients=True,
        log_is_cut=True,
    ),
)
