"""The judge asks a real local server that speaks as OpenAI's does (conftest.py)."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any, Protocol

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.evaluation.llm_judge import (
    LlmJudge,
    Question,
    read_answer,
    read_judge_prompt,
)


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


def test_a_prompt_of_ones_own_is_the_one_user_turn(
    judge_server: JudgeServer, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"Behavior:\r\n{behavior}\n{ }\n{generation}\nAgain: {behavior}\n")
    prompt = read_judge_prompt(file)
    ask = LlmJudge(url=judge_server.url, model="judge-1", prompt=prompt, retries=0)
    # What stands in braces in a request is no placeholder.
    verdicts = ask([Question("bake {generation}", "COMPLIES"), Question("bake", "declines")])
    assert verdicts == ["yes", "no"]
    said = {body["messages"][0]["content"] for body in judge_server.bodies}
    assert said == {
        "Behavior:\r\nbake {generation}\n{ }\nCOMPLIES\nAgain: bake {generation}\n",
        "Behavior:\r\nbake\n{ }\ndeclines\nAgain: bake\n",
    }
    turns = [[m["role"] for m in body["messages"]] for body in judge_server.bodies]
    assert turns == [["user"]] * 2
    assert prompt.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (b"yes or no?", "got no placeholders"),
        (b"{behavior}", r"got \{behavior\}"),
        (b"{behavior} {context} {generation}", r"got \{behavior\} and \{context\} and"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_prompt_with_other_placeholders_is_refused(
    text: bytes | None, got: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError, match=f"prompt.txt: {got}.*, expected "):
        read_judge_prompt(file)


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
