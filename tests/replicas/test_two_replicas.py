"""Two servers behind nginx: one restarted after the other, then one killed, under load."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from circuit_breakers.audit.store import AuditStore
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.policies.api_keys import Pepper, new_key

from ..docker.tools import find_program
from ..server.audit.test_postgresql import Cluster, cluster
from .replica import Replica, nginx_before

__all__ = ["cluster"]  # a fixture

PEPPER = "a pepper for two replicas"
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
"""Trips on the answer: a probe of the breaker reads the word Paris."""
LONG = "Write a long story about a ship and its crew."
NUM_STREAMS = 6


class House(NamedTuple):
    """Two replicas and the way to them."""

    replicas: list[Replica]
    url: str
    key: str
    audit_url: str

    def ask(self, text: str, url: str | None = None, **fields: Any) -> httpx.Response:
        return httpx.post(
            f"{url or self.url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {self.key}"},
            json=body(text, **fields),
            timeout=300,
        )

    def samples(self, name: str) -> list[float]:
        return [replica.samples()[name] for replica in self.replicas]


class Stream(NamedTuple):
    """How a stream ended."""

    num_chunks: int
    is_done: bool
    error: str | None


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        **fields,
    }


@pytest.fixture(scope="module")
def house(
    cluster: Cluster,
    word_breaker: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    nginx = find_program("nginx")
    root = tmp_path_factory.mktemp("replicas")
    key = new_key()
    (root / "policies.toml").write_text(
        f'default = "named"\n[policies.named]\n'
        f'[[keys]]\nid = "team-a"\nhash = "{Pepper(PEPPER.encode()).hash(key)}"\n'
    )
    replicas = [
        Replica(
            root,
            *("--breaker", str(word_breaker), "--policies", str(root / "policies.toml")),
            *("--audit-spool", str(root / f"spool-{number}"), "--drain-delay-s", "1"),
            env={"CIRCUIT_BREAKERS_AUDIT_URL": cluster.url, "CIRCUIT_BREAKERS_PEPPER": PEPPER},
        )
        for number in range(2)
    ]
    try:
        for replica in replicas:
            replica.wait_until_ready()
        with nginx_before([r.port for r in replicas], nginx, root) as url:
            yield House(replicas, url, key, cluster.url)
    finally:
        for replica in replicas:
            if replica.process.poll() is None:
                replica.die()


def test_keys_policies_and_metrics_hold_whichever_server_answers(house: House) -> None:
    before = sum(house.samples("circuit_breakers_trips_total"))
    for url in (house.url, *(replica.url for replica in house.replicas)):
        answer = house.ask(QUESTION, url, max_tokens=16).json()
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        assert (guard_of(answer)["policy"], guard_of(answer)["tripped"]) == ("named", True)
        assert httpx.post(f"{url}/v1/chat/completions", json=body(QUESTION)).status_code == 401
    # One through the router, one at each server.
    assert sum(house.samples("circuit_breakers_trips_total")) == before + 3


def test_the_router_shows_no_servers_metrics(house: House) -> None:
    assert httpx.get(f"{house.url}/metrics").status_code == 404


def test_a_rolling_restart_loses_no_request(house: House) -> None:
    stop = threading.Event()

    def load(number: int) -> tuple[int, list[str]]:
        num, failures = 0, []
        while not stop.is_set():
            num += 1
            if number == 0:
                ended = stream(house, max_tokens=8)
                failures += [] if ended.is_done else [str(ended)]
            else:
                try:
                    answer = house.ask(LONG, max_tokens=8)
                    failures += [] if answer.status_code == 200 else [answer.text]
                except httpx.TransportError as e:
                    failures.append(repr(e))
            # The servers share these cores with a server that starts.
            time.sleep(0.2)
        return num, failures

    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(load, number) for number in range(2)]
        try:
            for replica in house.replicas:
                assert replica.leave() == 0
                replica.start()
                replica.wait_until_ready()
        finally:
            stop.set()
        ended = [each.result() for each in loads]
    print(f"requests during the rolling restart, and failures: {ended}")
    assert [failures for _, failures in ended] == [[], []]
    assert all(num > 0 for num, _ in ended)


def test_a_dead_servers_streams_end_with_an_error_and_all_others_succeed(house: House) -> None:
    dying = house.replicas[0]
    begun = threading.Barrier(NUM_STREAMS + 1, timeout=120)
    with ThreadPoolExecutor(max_workers=2 * NUM_STREAMS) as pool:
        streams = [
            pool.submit(stream, house, begun.wait, max_tokens=400) for _ in range(NUM_STREAMS)
        ]
        begun.wait()
        num_on = house.samples("circuit_breakers_running_requests")
        # Not begun to be answered: the other server takes these over.
        whole = [pool.submit(house.ask, LONG, max_tokens=100) for _ in range(4)]
        wait_until(
            lambda: sum(house.samples("circuit_breakers_running_requests")) == NUM_STREAMS + 4
        )
        dying.die()
        fresh = [pool.submit(house.ask, LONG, max_tokens=4) for _ in range(4)]
        ended = [each.result() for each in streams]
        statuses = [each.result().status_code for each in (*whole, *fresh)]
    broken = [each for each in ended if each.error is not None]
    print(f"streams on each server {num_on}, broken {len(broken)}, statuses {statuses}")
    assert sum(num_on) == NUM_STREAMS
    assert min(num_on) > 0, "the router gave one server all of them"
    assert len(broken) == num_on[0]
    assert [each for each in broken if each.is_done or each.num_chunks == 0] == []
    assert [each for each in ended if each.error is None and not each.is_done] == []
    assert statuses == [200] * 8


def test_one_log_has_the_trips_of_both_and_every_start(house: House) -> None:
    answer = house.ask(QUESTION, max_tokens=16).json()
    assert house.replicas[1].leave() == 0
    store = AuditStore(house.audit_url)
    try:
        rows = list(store.rows())
    finally:
        store.close()
    assert verify_rows(rows).findings == ()
    # Two servers, each restarted once.
    assert [row["action"] for row in rows].count("started") == 4
    trips = [row for row in rows if row["kind"] == "trip"]
    # Three in the first test, one here. A long story may come to Paris too, at another token.
    at = guard_of(answer)["token_index"]
    assert [row["token_index"] for row in trips].count(at) == 4
    assert {(row["key_id"], row["policy"]) for row in trips} == {("team-a", "named")}


def guard_of(answer: dict[str, Any]) -> dict[str, Any]:
    guard: dict[str, Any] = answer["choices"][0]["guard"]
    return guard


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stream(house: House, on_first: Callable[[], Any] | None = None, **fields: Any) -> Stream:
    """Reads a stream to its end, whatever that is."""
    num, is_done = 0, False
    with httpx.Client(timeout=300) as client:
        try:
            with client.stream(
                "POST",
                f"{house.url}/v1/chat/completions",
                headers={"Authorization": f"Bearer {house.key}"},
                # Ends at its length, not when the model thinks that it has told enough.
                json=body(LONG, stream=True, ignore_eos=True, **fields),
            ) as response:
                if response.status_code != 200:
                    return Stream(0, False, f"status {response.status_code}: {response.read()!r}")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        is_done = True
                    elif line.startswith("data: "):
                        if "error" in json.loads(line.removeprefix("data: ")):
                            return Stream(num, is_done, line)
                        num += 1
                        if num == 2 and on_first is not None:
                            on_first()
        except httpx.TransportError as e:
            return Stream(num, is_done, type(e).__name__)
    return Stream(num, is_done, None)
