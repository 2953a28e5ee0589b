"""Faults under traffic: what the clients saw, how long it took, and what was lost.

    PYTHONPATH=server python -m tests.reliability.run all
    PYTHONPATH=server python -m tests.reliability.run kill-engine-core disk-full --json out.json

One real server, the breaker for words, keys and a SQLite audit log. Exits with 1 where anything was
lost: a token that transformers would have stopped, a trip that a client was told of and the log has
not, a log that does not verify, or an answer of clients whom the fault should have spared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from circuit_breakers.models import resolve_model

from ..server.api.oracle import word_oracle
from .faults import FAULTS, REMOVED, Fault
from .house import KEY, LIMITED_KEY, House, open_house, wait_until
from .judge import Judge, missing_trips
from .traffic import BY_CHANCE, STEADY, Answer, Traffic

_BEFORE_S = _AFTER_S = 5.0
_SETTLE_S = 90
_NUM_LIMITED = 2
"""Clients under load whose key has a rate."""


def suffer(house: House, fault: Fault) -> tuple[dict[str, Any], list[Answer]]:
    """Does the fault under traffic; its row, and all answers from just before to just after."""
    answers: list[Answer] = []
    loads = {KEY: fault.num_clients, LIMITED_KEY: _NUM_LIMITED if fault.arguments else 0}
    with contextlib.ExitStack() as stack:
        for key, num in loads.items():
            if num:
                traffic = Traffic(
                    house.server.url,
                    key,
                    STEADY + BY_CHANCE,
                    num_clients=num,
                    on_answer=answers.append,
                )
                stack.enter_context(traffic.running())
        time.sleep(_BEFORE_S)
        began_s = time.monotonic()
        came_through = fault.do(house)
        time.sleep(_AFTER_S)
    missing = missing_trips(answers, logged(house))
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not missing_trips(answers, logged(house)), _SETTLE_S)
    missing = missing_trips(answers, logged(house))
    since = [answer for answer in answers if answer.ended_s >= began_s]
    row = {
        "fault": fault.name,
        "means": fault.means,
        "server": came_through,
        "whole": sum(answer.is_whole for answer in since),
        "not_whole": dict(
            Counter(answer.outcome for answer in since if not answer.is_whole).most_common()
        ),
        "in_flight": sum(answer.began_s < began_s for answer in since),
        "latency_s": latencies(since),
        "without_retry_after": sum(
            answer.status in (429, 503) and answer.retry_after is None for answer in since
        ),
        "told_trips": sum(answer.num_told_trips for answer in answers),
        "missing_trips": missing,
    }
    return row, answers


def logged(house: House) -> list[str]:
    """Ids of all trips on disk, those of a log that was moved away included."""
    old = house.database.with_name(f"{REMOVED}{house.database.name}")
    return house.trips() + (house.trips(old) if old.exists() else [])


def latencies(answers: list[Answer]) -> dict[str, float]:
    """Of those that were served: median and 95th percentile."""
    took = sorted(a.ended_s - a.began_s for a in answers if a.is_whole)
    if len(took) < 2:
        return {}
    return {
        "median": round(statistics.median(took), 2),
        "p95": round(statistics.quantiles(took, n=20)[-1], 2),
    }


def problems(row: dict[str, Any], fault: Fault) -> list[str]:
    """What must not be."""
    found = list(row["wrong"])
    if row["unguarded_tokens"]:
        found.append(f"{row['unguarded_tokens']} tokens that should have been stopped")
    if row["missing_trips"]:
        found.append(f"trips that the log lacks: {row['missing_trips']}")
    if row["verify"].startswith("exit 0") == fault.log_is_cut:
        found.append(row["verify"])
    if fault.spares_clients and row["not_whole"]:
        found.append(f"clients with no part in it saw {row['not_whole']}")
    if row["without_retry_after"]:
        found.append(f"{row['without_retry_after']} refusals that do not say when to come again")
    if not row["told_trips"]:
        found.append("no trip was told of: nothing was tried")
    return [f"{fault.name}: {problem}" for problem in found]


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/reliability.md has it."""
    lines = ["| fault | clients saw | server | lost |", "|---|---|---|---|"]
    for row in rows:
        failures = "".join(f"; {num} x {what}" for what, num in row["not_whole"].items())
        latency = row["latency_s"] and "; median {median} s, p95 {p95} s".format(**row["latency_s"])
        lines.append(
            f"| {row['means']} | {row['whole']} whole{failures}{latency or ''} | {row['server']} | "
            f"{row['unguarded_tokens']} tokens, {len(row['missing_trips'])} of "
            f"{row['told_trips']} trips |"
        )
    return "\n".join(lines)


@contextmanager
def a_house() -> Iterator[House]:
    with tempfile.TemporaryDirectory() as folder, open_house(Path(folder)) as house:
        yield house


def main(names: list[str], out: Path | None) -> int:
    chosen = [fault for fault in FAULTS if fault.name in names or "all" in names]
    rows: list[dict[str, Any]] = []
    found: list[str] = []
    model = resolve_model("smollm2-135m-instruct")
    with a_house() as house:
        judge = Judge(
            word_oracle(model, house.breaker),
            AutoTokenizer.from_pretrained(model.path, local_files_only=True),
        )
        for fault in chosen:
            house.be_up(*fault.arguments, env=fault.env(house))
            print(f"{fault.name}: {fault.means} ...", flush=True)
            row, answers = suffer(house, fault)
            row["wrong"], house.wrong = house.wrong, []
            row["verify"] = house.verify()
            row["unguarded_tokens"] = judge.num_unguarded(answers)
            rows.append(row)
            found += problems(row, fault)
            print(json.dumps(row, indent=1), flush=True)
            if out is not None:
                out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    print("\n".join(found) or "nothing was lost")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Faults under traffic, and what was lost.")
    parser.add_argument("fault", nargs="+", choices=["all", *(fault.name for fault in FAULTS)])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.exit(main(arguments.fault, arguments.json))
