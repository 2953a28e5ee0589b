"""A script in the place of vLLM's engine that judges as the engine core does, or fails to.

The request says what its tokens score. The policy comes as the guard sends it to the engine core;
what becomes of a token is worked out here in plain comparisons, by none of the guard's own code.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI

from circuit_breakers.api.errors import ApiError
from circuit_breakers.engine.delivery import TokenScores

from .scripted import ScriptedCall
from .scripted_engine import NUM_PROBES, NUM_PROMPT_TOKENS, EngineCall, EngineServing

__all__ = ["Client", "Fault", "JudgingServing"]

Fault = Literal["lets a trip through", "gives no score", "dies"]


class JudgedCall(EngineCall):
    """One request: the logits of p0 at its prompt's end and at each token, None for no score."""

    def __init__(
        self,
        *,
        messages: Any,
        prompt: float,
        scores: list[float | None],
        held: bool = False,
        fault: Fault | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__(num_events=len(scores), held=held, stream=stream)
        self.prompt = prompt
        self.scores = scores
        self.fault = fault
        """Of the last token."""
        self.gate = asyncio.Event()


class JudgingEngine:
    """Gives out a token a step; a held stream pauses after its first one until its gate is open."""

    dead_error = None
    model_config = SimpleNamespace(max_model_len=4096)

    def __init__(self) -> None:
        self.errored = False
        self.num_open = 0

    async def abort(self, request_id: str) -> None:
        pass

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[Any, None]:
        call: JudgedCall = params.call
        own = params.extra_args["circuit_breakers"]
        threshold, enforces = own["thresholds"][0], own["mode"] == "enforce"
        scores = TokenScores()
        self.num_open += 1
        try:
            logits: list[float | None] = [0.0] * (NUM_PROMPT_TOKENS - 1) + [call.prompt]
            if enforces and call.prompt >= threshold:
                yield _output(scores, logits, [], (call.prompt, threshold))
                return
            for number, score in enumerate(call.scores):
                is_last = number == call.num_events - 1
                fault = call.fault if is_last else None
                if fault == "dies":
                    raise RuntimeError("the engine died")
                if fault != "gives no score":
                    logits.append(score)
                stops = score is None or (enforces and score >= threshold)
                if stops and fault is None:
                    yield _output(scores, logits, [], (score, threshold))
                    return
                yield _output(scores, logits, [1], finished=is_last)
                if call.held and number == 0 and not is_last:
                    await call.gate.wait()
                logits = []
        finally:
            self.num_open -= 1


def _output(
    scores: TokenScores,
    logits: list[float | None],
    token_ids: list[int],
    trip: tuple[float | None, float] | None = None,
    *,
    finished: bool = True,
) -> Any:
    start = scores.num_tokens
    rows = np.zeros((len(logits), NUM_PROBES), np.float32)
    rows[:, 0] = [np.nan if logit is None else logit for logit in logits]
    end = start + len(logits)
    phase = "prompt" if end <= NUM_PROMPT_TOKENS else "completion"
    sent = None if trip is None else ["p0", trip[0] or np.nan, trip[1], end - 1, phase]
    scores.extend(start, NUM_PROBES, rows.tobytes(), sent)
    reason = "content_filter" if trip else "stop" if finished else None
    completion = SimpleNamespace(index=0, token_ids=token_ids, finish_reason=reason, guard=scores)
    return SimpleNamespace(
        prompt_token_ids=[0] * NUM_PROMPT_TOKENS, outputs=[completion], finished=finished
    )


class JudgingServing(EngineServing):
    """Serving classes around a GuardedEngine around that engine; its errors become vLLM's."""

    model_name = "m"

    def __init__(self) -> None:
        super().__init__()
        self.engine: Any = JudgingEngine()
        self.guarded._engine = self.engine
        self.calls: list[JudgedCall] = []

    def parse(self, endpoint: str, data: dict[str, Any], *, max_choices: int) -> JudgedCall:
        call = JudgedCall(**data)
        number = len(self.calls)
        call.shape = SimpleNamespace(**{**vars(call.shape), "id": f"chatcmpl-{number}"})
        self.calls.append(call)
        return call

    async def start(  # type: ignore[override]
        self, call: JudgedCall
    ) -> dict[str, Any] | AsyncGenerator[str, None]:
        try:
            return await super().start(call)
        except RuntimeError as e:
            raise ApiError(500, str(e)) from e

    async def _chunks(self, call: ScriptedCall, outputs: Any) -> AsyncGenerator[str, None]:
        chunks = super()._chunks(call, outputs)  # type: ignore[arg-type]
        try:
            async for chunk in chunks:
                yield chunk
        except RuntimeError as e:
            raise ApiError(500, str(e)) from e
        finally:
            await chunks.aclose()


class Client:
    """One request to the app, and all that has come back so far."""

    def __init__(self, app: FastAPI, path: str, key: str, body: dict[str, Any]) -> None:
        self._raw: bytes | None = json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self.status = 0
        self.body = b""
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._raw is not None:
            raw, self._raw = self._raw, None
            return {"type": "http.request", "body": raw, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message["body"]
        self._news.set()

    async def first_token(self) -> bool:
        """Whether a token has come, before the answer ended."""
        while b'"content":"x"' not in self.body and not self._task.done():
            news = asyncio.create_task(self._news.wait())
            await asyncio.wait({news, self._task}, return_when=asyncio.FIRST_COMPLETED)
            self._news.clear()
            news.cancel()
        return not self._task.done()

    async def end(self) -> None:
        """The answer has come to its end."""
        await self._task
        self._gone.set()

    async def leave(self) -> None:
        """The connection is closed, and the server is done with it."""
        self._gone.set()
        await self._task

    @property
    def chunks(self) -> list[Any]:
        """The JSON that came: a whole answer, or the events of a stream without [DONE]."""
        if not self.body.startswith(b"data: "):
            return [json.loads(self.body)]
        events = self.body.decode().split("\n\n")
        return [json.loads(e.removeprefix("data: ")) for e in events if e and "[DONE]" not in e]
