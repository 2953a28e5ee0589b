"""Half an hour of mixed traffic: whether memory, descriptors and threads of the server stay flat.

    PYTHONPATH=server python -m tests.reliability.soak --minutes 30 --json soak.json

The slope is that of a line through the medians of each minute after the warm-up. Exits with 1 where
a request failed, a trip is missing from the audit log, or something grows: the slope's interval of
95 % lies above what GROWTH allows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import linregress, t

from .house import KEY, House, open_house, wait_until
from .traffic import STEADY, Answer, Traffic

SAMPLE_S = 10.0
WARM_UP_S = 300.0
"""What is loaded and kept once comes first; a shorter soak warms up for a third of its time."""
NUM_CLIENTS = 3
PAUSE_S = 0.3
MIN_MINUTES = 6
"""A line through fewer points has no interval to speak of."""
GROWTH = {"rss_mib": 20.0, "fds": 2.0, "threads": 1.0}
"""An hour, from which on it counts as a leak; 20 MiB an hour are 500 a day."""


class Counts:
    """What the clients were told, in sums."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []
        self.expected_trips = self.seen_trips = 0
        self._lock = threading.Lock()

    def add(self, answer: Answer) -> None:
        with self._lock:
            self.outcomes[answer.kind.name, answer.outcome] += 1
            self.expected_trips += answer.kind.num_trips or 0
            self.seen_trips += answer.num_told_trips
            if not answer.is_whole:
                self.failed.append(f"{answer.kind.name}: {answer.outcome}")


def sample(processes: list[psutil.Process], began_s: float) -> dict[str, Any]:
    each = [
        {
            "rss_mib": process.memory_info().rss / 2**20,
            "fds": process.num_fds(),
            "threads": process.num_threads(),
        }
        for process in processes
    ]
    sums = {name: sum(one[name] for one in each) for name in GROWTH}
    return {"at_s": time.monotonic() - began_s, **sums, "processes": each}


def slope(samples: list[dict[str, Any]], name: str, after_s: float) -> dict[str, float]:
    """Growth an hour with its 95 % interval, and the first and last minute's level."""
    by_minute: dict[int, list[float]] = {}
    for one in samples:
        if one["at_s"] >= after_s:
            by_minute.setdefault(int(one["at_s"] // 60), []).append(one[name])
    minutes = sorted(by_minute)
    levels = [statistics.median(by_minute[minute]) for minute in minutes]
    line = linregress([minute / 60 for minute in minutes], levels)
    half = float(t.ppf(0.975, len(minutes) - 2) * line.stderr)
    growth = float(line.slope)
    return {
        "first": levels[0],
        "last": levels[-1],
        "per_hour": growth,
        "low": growth - half,
        "high": growth + half,
    }


def soak(house: House, minutes: float) -> dict[str, Any]:
    counts = Counts()
    traffic = Traffic(
        house.server.url,
        KEY,
        STEADY,
        num_clients=NUM_CLIENTS,
        pause_s=PAUSE_S,
        on_answer=counts.add,
    )
    samples = []
    processes = house.processes()
    began_s = time.monotonic()
    with traffic.running():
        while (at_s := time.monotonic() - began_s) < minutes * 60:
            samples.append(sample(processes, began_s))
            print(
                f"{at_s:6.0f} s  {samples[-1]['rss_mib']:8.1f} MiB  {samples[-1]['fds']} fds  "
                f"{samples[-1]['threads']} threads  {counts.outcomes.total()} requests",
                flush=True,
            )
            time.sleep(SAMPLE_S)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: len(house.trips()) >= counts.seen_trips)
    series = house.server.samples()
    warm_up_s = min(WARM_UP_S, minutes * 20)
    return {
        "minutes": minutes,
        "requests": counts.outcomes.total(),
        "outcomes": {": ".join(key): num for key, num in sorted(counts.outcomes.items())},
        "failed": counts.failed,
        "trips": {
            "expected": counts.expected_trips,
            "seen": counts.seen_trips,
            "audited": len(house.trips()),
        },
        "leaked_tokens": series["circuit_breakers_leaked_tokens_total"],
        "unscored_tokens": series["circuit_breakers_unscored_tokens_total"],
        "growth": {name: slope(samples, name, warm_up_s) for name in GROWTH},
        "api_growth_mib": slope(
            [one | {"api": one["processes"][0]["rss_mib"]} for one in samples], "api", warm_up_s
        ),
        "exit_code": house.server.leave(),
        "verify": house.verify(),
        "samples": samples,
    }


def problems(report: dict[str, Any]) -> list[str]:
    """What must not be."""
    found = [f"failed: {each}" for each in report["failed"]]
    if len(set(report["trips"].values())) != 1 or not report["trips"]["seen"]:
        found.append(f"trips: {report['trips']}")
    found += [
        f"{name}: {report[name]}"
        for name in ("leaked_tokens", "unscored_tokens", "exit_code")
        if report[name]
    ]
    if not report["verify"].startswith("exit 0"):
        found.append(report["verify"])
    found += [
        f"{name} grows by {growth['per_hour']:.1f} an hour ({growth['low']:.1f} to "
        f"{growth['high']:.1f}), expected at most {GROWTH[name]:.1f}"
        for name, growth in report["growth"].items()
        if growth["low"] > GROWTH[name]
    ]
    return found


def main(minutes: float, out: Path | None) -> int:
    with tempfile.TemporaryDirectory() as folder, open_house(Path(folder)) as house:
        house.be_up(env={})
        report = soak(house, minutes)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=1))
    found = problems(report)
    print("\n".join(found) or "ok")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Whether the server stays flat under traffic.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.minutes < MIN_MINUTES:
        parser.error(f"got --minutes {arguments.minutes:g}, expected at least {MIN_MINUTES}")
    sys.exit(main(arguments.minutes, arguments.json))
