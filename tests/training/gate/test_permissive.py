"""The bypass suite and the client's calls on servers that do what a guarded one must not."""

from __future__ import annotations

from typing import Any

from circuit_breakers_training.gate.bypass import bypass
from circuit_breakers_training.gate.conformance import conformance

from .conftest import MakeTarget, ScriptedServer

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Red."}, "finish_reason": "stop"}
ANSWER: dict[str, Any] = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [CHOICE],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def test_a_server_that_answers_everything_lets_everything_through(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    scripted.otherwise = (200, ANSWER)
    rows = bypass(make_target(scripted))
    assert len(rows) == 7
    for row in rows:
        assert row.passed is False
        assert row.value == row.count == len(row.notes) > 0


def test_a_refusal_for_another_reason_is_none(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    # What vLLM says of a field of the wrong type, and a server that refuses every request.
    scripted.otherwise = (400, {"error": {"code": "invalid_value", "param": "echo"}})
    kept = {row.name for row in bypass(make_target(scripted)) if row.passed}
    # Of an unknown spelling, any refusal will do.
    assert kept == {"spellings"}


def test_one_field_that_is_let_through_is_named(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        sent = [name for name, value in body.items() if value == "circuit-breakers-gate"]
        if sent == ["echo"]:
            return 200, ANSWER
        return 400, {"error": {"code": "unsupported_parameter", "param": "".join(sent)}}

    scripted.answers[("POST", "/v1/chat/completions")] = answer
    (fields, *_) = bypass(make_target(scripted))
    chat = [note for note in fields.notes if note.startswith("/v1/chat/completions: ")]
    assert chat == ["/v1/chat/completions: echo"]


def test_canaries_are_what_is_sent(scripted: ScriptedServer, make_target: MakeTarget) -> None:
    target = make_target(scripted)
    asked: list[Any] = []
    scripted.answers[("POST", "/v1/chat/completions/")] = lambda body: (
        asked.append(body["messages"]) or (404, {})
    )
    bypass(target)
    canary = next(c for c in target.breaker.manifest.canaries if c.label == "harmful")
    assert asked == [[{"role": m.role, "content": m.content} for m in canary.messages]]


def test_an_openai_server_without_a_guard_does_not_conform(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    scripted.answers[("POST", "/v1/chat/completions")] = (200, ANSWER)
    (row,) = conformance(make_target(scripted))
    assert row.passed is False
    failed = {note.partition(":")[0]: note for note in row.notes}
    assert "expected a guard report" in failed["chat"]
    assert "harmful canary" in failed["a trip"]
    assert "NotFoundError 404" in failed["moderations"]
    # The answer has the same text for one seed, and this server gives nothing but that.
    assert "chat, seed" not in failed
    assert row.value == len(row.notes) < row.count


def test_a_server_that_answers_nonsense_fails_every_call(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    target = make_target(scripted)
    scripted.answers.clear()
    scripted.otherwise = (200, {"choices": None, "data": None})
    (row,) = conformance(target)
    assert row.value == row.count == 16
