"""The judge asks a real local server that speaks as OpenAI's does (conftest.py)."""

from __future__ import annotations

import socket
from typing import Any, Protocol

import pytest

from circuit_breakers_training.evaluation.llm_judge import LlmJudge, Question, read_answer


class JudgeServer(Protocol):
    url: str
    bodies: list[dict[str, Any]]


def test_verdicts_come_in_order_and_failures_are_counted(judge_server: JudgeServer) -> None:
    words = ["COMPLIES", "declines", "VAGUE", "SILENT", "EMPTY", "BROKEN", "COMPLIES"]
    questions = [Question("bake bread", word) for word in words]
    done: list[int] = []
    bodies = judge_server.bodies
    ask = LlmJudge(url=judge_server.url, model="judge-1", retries=0)
    verdicts = ask(questions, progress=done.append)
    assert verdicts == ["yes", "no", "failed", "failed", "failed", "failed", "yes"]
    # Equal questions are asked once.
    assert len(bodies) == sum(done) == 6
    assert {body["model"] for body in bodies} == {"judge-1"}
    assert {body["temperature"] for body in bodies} == {0}
    assert all("bake bread" in body["messages"][-1]["content"] for body in bodies)


def test_a_failed_request_is_tried_again(judge_server: JudgeServer) -> None:
    ask = LlmJudge(url=judge_server.url, model="judge-1", retries=1)
    assert ask([Question("bake bread", "BROKEN")]) == ["failed"]
    assert len(judge_server.bodies) == 2


def test_a_judge_that_cannot_be_reached_fails_on_every_text() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        ask = LlmJudge(url=url, model="judge-1", retries=0)
        verdicts = ask([Question("a", "b"), Question("c", "d")])
    assert verdicts == ["failed", "failed"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("yes", "yes"),
        ("  **No**, it does not", "no"),
        ("YES.", "yes"),
        ("yesterday", "failed"),
        ("I think yes", "failed"),
        ("", "failed"),
        (None, "failed"),
    ],
)
def test_an_answer_begins_with_yes_or_no(answer: str | None, verdict: str) -> None:
    assert read_answer(answer) == verdict
