"""The server's counters: a real server leaks nothing, so that a scripted one has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import RemoteServerError
from circuit_breakers.remote_server import RemoteServer
from circuit_breakers_training.gate.counters import read_counters
from circuit_breakers_training.gate.leaks import leaks
from circuit_breakers_training.gate.target import Target

from .conftest import MakeTarget, ScriptedServer


def page(*, leaked: int, unscored: int, scored: int, failures: int = 0, ok: int = 1) -> str:
    return (
        f"# TYPE circuit_breakers_leaked_tokens_total counter\n"
        f"circuit_breakers_leaked_tokens_total {leaked}.0\n"
        f"circuit_breakers_unscored_tokens_total {unscored}.0\n"
        f'circuit_breakers_scored_tokens_total{{model="a"}} {scored}.0\n'
        f'circuit_breakers_scored_tokens_total{{model="b"}} 1.0\n'
        f"circuit_breakers_canary_failures_total {failures}.0\n"
        f"circuit_breakers_canary_ok {ok}.0\n"
        f"vllm:other_total 5.0\n"
    )


BEFORE = {"leaked": 2, "unscored": 0, "scored": 100}


@pytest.mark.parametrize(
    ("after", "missed"),
    [
        ({"leaked": 2, "unscored": 0, "scored": 101}, []),
        ({"leaked": 3, "unscored": 0, "scored": 101}, ["leaked"]),
        ({"leaked": 2, "unscored": 1, "scored": 101}, ["unscored"]),
        ({"leaked": 2, "unscored": 0, "scored": 101, "failures": 1}, ["canary_failures"]),
        ({"leaked": 2, "unscored": 0, "scored": 101, "ok": 0}, ["canaries"]),
        # Nothing was scored: no leak among nothing is no proof.
        (
            {"leaked": 2, "unscored": 0, "scored": 100},
            ["leaked", "unscored", "scored", "canary_failures"],
        ),
        # The server started anew meanwhile.
        (
            {"leaked": 0, "unscored": 0, "scored": 50},
            ["leaked", "unscored", "scored", "canary_failures"],
        ),
    ],
)
def test_what_was_counted_meanwhile(
    scripted: ScriptedServer, make_target: MakeTarget, after: dict[str, int], missed: list[str]
) -> None:
    metrics = ("GET", "/metrics")
    scripted.answers[metrics] = (200, page(**BEFORE))
    target: Target = make_target(scripted)
    assert target.before["circuit_breakers_scored_tokens_total"] == 101, "summed over the labels"
    scripted.answers[metrics] = (200, page(**after))
    rows = leaks(target)
    assert [row.name for row in rows if not row.passed] == missed


def test_a_counter_that_is_not_there_is_missed(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    scripted.answers[("GET", "/metrics")] = (200, page(**BEFORE))
    target = make_target(scripted)
    renamed = page(leaked=2, unscored=0, scored=200).replace("leaked_tokens", "renamed")
    scripted.answers[("GET", "/metrics")] = (200, renamed)
    assert [row.name for row in leaks(target) if not row.passed] == ["leaked"]


@pytest.mark.parametrize(
    "answer", [(401, {}), (200, "vllm:other_total 5.0\n"), (200, "<html>"), (404, "nothing")]
)
def test_a_page_without_them_is_an_error(
    scripted: ScriptedServer, answer: tuple[int, Any], tmp_path: Path
) -> None:
    scripted.answers[("GET", "/metrics")] = answer
    with pytest.raises(RemoteServerError, match="expected the counters of a guarded server"):
        read_counters(RemoteServer(scripted.url))
