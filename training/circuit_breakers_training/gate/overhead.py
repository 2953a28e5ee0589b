"""Tokens a second beside an unguarded server, in alternating blocks of the same requests.

Both answer requests at once to a fixed length, and never the same prompts twice, so that neither
answers from its prefix cache. A ratio compares two neighbouring blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from circuit_breakers.engine.bench.ratios import spread
from circuit_breakers.errors import EvaluationError
from circuit_breakers.remote_server import RemoteServer
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.gate.asking import CHAT, chat_body
from circuit_breakers_training.gate.rows import NotRun, Row
from circuit_breakers_training.gate.target import ServedModel, Target, ask_each

__all__ = ["overhead"]

_BLOCK: Final = 16
"""Requests of a block."""


def overhead(target: Target) -> list[Row] | NotRun:
    """The ratio, with its quartiles over the pairs of blocks."""
    if target.unguarded is None or target.unguarded_model is None:
        return NotRun("needs --unguarded-url; give it, or --skip overhead")
    benign = [prompt for prompt in target.prompts if prompt.label == "benign"]
    if not benign:
        raise EvaluationError("got no benign request in the test split, expected some to load with")
    sides = (
        (target.server, target.model),
        (target.unguarded, target.unguarded_model),
    )
    ratios = []
    # The first pair warms both servers up, and is left out.
    for pair in range(target.settings.pairs + 1):
        bodies = _block(benign, pair)
        order = (0, 1) if pair % 2 else (1, 0)
        speed = {i: _tokens_per_s(target, *sides[i], bodies, f"pair {pair}") for i in order}
        if pair:
            ratios.append(speed[0] / speed[1])
    found = spread(ratios)
    assert found is not None, "there is at least one pair"
    return [
        Row(
            name="ratio",
            what="tokens a second, guarded over unguarded: median and quartiles of the pairs",
            count=found.count,
            value=found.median,
            low=found.q1,
            high=found.q3,
            bar=target.bars["overhead.ratio"],
            source=f"{_BLOCK} requests a block, POST {CHAT} on both",
        )
    ]


def _block(benign: Sequence[EvalPrompt], pair: int) -> list[Attempt]:
    attempts = []
    for i in range(_BLOCK):
        prompt = benign[(pair * _BLOCK + i) % len(benign)]
        turn = prompt.messages[-1]
        # Prompts come round again; the number keeps them from being the same.
        text = f"({pair}.{i}) {turn.content}"
        messages = (*prompt.messages[:-1], Message(turn.role, text))
        attempts.append(
            Attempt(suite="overhead", technique="as-is", prompt=prompt, messages=messages)
        )
    return attempts


def _tokens_per_s(
    target: Target,
    server: RemoteServer,
    model: ServedModel,
    attempts: Sequence[Attempt],
    title: str,
) -> float:
    """Raises EvaluationError where a request gets no answer of full length and no trip."""
    length = target.settings.max_new_tokens

    def ask(attempt: Attempt) -> int:
        body: dict[str, Any] = {**chat_body(model, attempt, length), "ignore_eos": True}
        answer = server.ask_patiently("POST", CHAT, body)
        usage = answer.json.get("usage") if isinstance(answer.json, dict) else None
        if answer.status != 200 or not isinstance(usage, dict):
            raise EvaluationError(
                f"got HTTP {answer.status} ({answer.code}) from {server.place}, expected an "
                "answer; a ratio of unequal work says nothing"
            )
        return int(usage["completion_tokens"])

    started = time.perf_counter()
    tokens = sum(ask_each(attempts, ask, None, title))
    elapsed_s = time.perf_counter() - started
    if tokens == 0:
        raise EvaluationError(f"got no token from {server.place}, expected answers")
    return tokens / elapsed_s
