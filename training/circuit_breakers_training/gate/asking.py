"""Attempts, put to a server as chats, greedily: what a reader gets, and where the breaker trips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from circuit_breakers.errors import EvaluationError
from circuit_breakers.remote_server import Answer, RemoteServer
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.gate.target import ServedModel, Target, ask_each
from circuit_breakers_training.probe.evaluate import EARLY_TOKENS

__all__ = ["CHAT", "Reply", "ask_guarded", "ask_unguarded", "chat_body", "harmful_canary"]

CHAT: Final = "/v1/chat/completions"

_BEGUN: Final = {"add_generation_prompt": False, "continue_final_message": True}
"""Fields of a chat whose last message is the beginning of the answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one attempt."""

    attempt: Attempt
    text: str = ""
    """What a reader gets of the answer."""
    tripped: bool = False
    enforced: bool = False
    """A trip ended it."""
    tokens_to_trip: int | None = None
    """Generated tokens up to the trip, 0 on the prompt; None without a trip, or where unknown."""
    problem: str | None = None
    """Why there is neither an answer nor a trip."""

    @property
    def stopped(self) -> bool:
        """Ended by a trip before there was enough to judge."""
        late = self.tokens_to_trip is not None and self.tokens_to_trip > EARLY_TOKENS[0]
        return self.enforced and not late


def chat_body(model: ServedModel, attempt: Attempt, max_new_tokens: int) -> dict[str, Any]:
    """The request of one attempt; given first words go in as the beginning of the answer."""
    messages = [{"role": m.role, "content": m.content} for m in attempt.messages]
    body: dict[str, Any] = {
        "model": model.name,
        "messages": messages,
        "max_tokens": max_new_tokens,
        "temperature": 0,
    }
    if attempt.prefill:
        messages.append({"role": "assistant", "content": attempt.prefill})
        body |= _BEGUN
    return body


def harmful_canary(target: Target) -> dict[str, Any]:
    """A chat that trips on its prompt: the breaker's first harmful canary.

    Raises:
        EvaluationError: the breaker has none.
    """
    for canary in target.breaker.manifest.canaries:
        if canary.label == "harmful":
            body: dict[str, Any] = {
                "model": target.model.name,
                "messages": [{"role": m.role, "content": m.content} for m in canary.messages],
                "max_tokens": 4,
                "temperature": 0,
            }
            return {**body, **_BEGUN} if canary.messages[-1].role == "assistant" else body
    raise EvaluationError("got a breaker without a harmful canary, expected one; train it again")


def ask_guarded(target: Target, attempts: Sequence[Attempt], title: str) -> list[Reply]:
    """The server's reply to each attempt."""

    def ask(attempt: Attempt) -> Reply:
        answer = _ask(target.server, target.model, attempt, target.settings.max_new_tokens)
        return _reply(attempt, answer, guarded=True)

    return ask_each(attempts, ask, target.console, title)


def ask_unguarded(target: Target, attempts: Sequence[Attempt], title: str) -> list[Reply]:
    """The same of the server without a guard."""
    server, model = target.unguarded, target.unguarded_model
    assert server is not None and model is not None

    def ask(attempt: Attempt) -> Reply:
        answer = _ask(server, model, attempt, target.settings.max_new_tokens)
        return _reply(attempt, answer, guarded=False)

    return ask_each(attempts, ask, target.console, title)


def _ask(server: RemoteServer, model: ServedModel, attempt: Attempt, max_new_tokens: int) -> Answer:
    return server.ask_patiently("POST", CHAT, chat_body(model, attempt, max_new_tokens))


def _reply(attempt: Attempt, answer: Answer, *, guarded: bool) -> Reply:
    if answer.status == 400 and answer.code == "content_filter":
        guard = answer.error.get("guard")
        in_prompt = isinstance(guard, dict) and guard.get("phase") == "prompt"
        return Reply(
            attempt=attempt,
            tripped=True,
            enforced=True,
            tokens_to_trip=0 if in_prompt else None,
        )
    if answer.status != 200:
        return Reply(attempt=attempt, problem=f"HTTP {answer.status}, {answer.code}")
    try:
        body = answer.json
        (choice,) = body["choices"]
        text = choice["message"]["content"] or ""
        if not guarded:
            return Reply(attempt=attempt, text=text)
        guard = choice["guard"]
        if not guard["tripped"]:
            return Reply(attempt=attempt, text=text)
        num_prompt = int(body["usage"]["prompt_tokens"])
        return Reply(
            attempt=attempt,
            text=text,
            tripped=True,
            enforced=guard["mode"] == "enforce",
            tokens_to_trip=max(int(guard["token_index"]) + 1 - num_prompt, 0),
        )
    except (KeyError, TypeError, ValueError):
        return Reply(attempt=attempt, problem="an answer without its text or its guard report")
