"""A script in the place of vLLM's engine client, behind the real GuardedEngine and the real app.

Each token comes with its score, as the engine core sends it; one of them may trip. Started as a
module it is `circuit-breakers serve` in all but vLLM:

    python -m tests.server.api.scripted_engine --port 8000 --max-concurrent-requests 1000
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np

from circuit_breakers.api.accounting import Usage
from circuit_breakers.api.errors import engine_dead
from circuit_breakers.api.responses import DONE, data_event
from circuit_breakers.engine.delivery import TokenScores
from circuit_breakers.engine.guarded import GuardedEngine

from ..policies.manifests import manifest
from .scripted import ScriptedCall, ScriptedServing, serve_script

__all__ = ["EngineCall", "EngineServing"]

NUM_PROMPT_TOKENS = 32
NUM_PROBES = 2
SAFE, TRIPPING = 0.0, 9.0
"""Logits of p0, whose threshold is 4."""


class ScriptedEngine:
    """Gives out a token a step; a held stream pauses after its first one until `gate` is set."""

    errored = False
    dead_error = None
    model_config = SimpleNamespace(max_model_len=4096)

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.num_open = 0

    async def abort(self, request_id: str) -> None:
        pass

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[Any, None]:
        call: EngineCall = params.call
        scores = TokenScores()
        prompt_token_ids = [0] * NUM_PROMPT_TOKENS
        self.num_open += 1
        if call.releases:
            self.gate.set()
            self.gate.clear()
        try:
            for number in range(call.num_events):
                start = scores.num_tokens
                rows = np.full((NUM_PROMPT_TOKENS + number + 1 - start, NUM_PROBES), SAFE, "f4")
                trip = None
                if number == call.trips_at:
                    rows[-1, 0] = TRIPPING
                    trip = ["p0", TRIPPING, 4.0, NUM_PROMPT_TOKENS + number, "completion"]
                scores.extend(start, NUM_PROBES, rows.tobytes(), trip)
                is_last = trip is not None or number == call.num_events - 1
                reason = "content_filter" if trip else "stop" if is_last else None
                completion = SimpleNamespace(
                    index=0,
                    token_ids=[] if trip else [1],
                    finish_reason=reason,
                    guard=scores,
                )
                yield SimpleNamespace(
                    prompt_token_ids=prompt_token_ids, outputs=[completion], finished=is_last
                )
                if is_last:
                    return
                await asyncio.sleep(call.pause_s)
                if call.held and number == 0:
                    await self.gate.wait()
        finally:
            self.num_open -= 1


class EngineCall(ScriptedCall):
    """One request: `num_events` tokens, of which the `trips_at`-th trips."""

    def __init__(
        self,
        *,
        trips_at: int | None = None,
        held: bool = False,
        releases: bool = False,
        dies: bool = False,
        **script: Any,
    ) -> None:
        super().__init__(**script)
        self.trips_at = trips_at
        self.held = held
        """Waits after its first token, until a request comes that `releases` all."""
        self.releases = releases
        self.dies = dies
        """The engine dies after the last token, with other choices still running."""
        self.num_delivered = 0

    def prompts_of(self, choices: set[int]) -> set[int]:
        return choices

    def usage(self) -> Usage:  # type: ignore[override]
        return Usage(num_prompt_tokens=NUM_PROMPT_TOKENS, num_completion_tokens=self.num_delivered)


class _Params:
    """As much of vLLM's sampling parameters as the GuardedEngine touches."""

    n = 1
    extra_args: ClassVar[Any] = None
    output_kind = SimpleNamespace(name="DELTA")

    def __init__(self, call: EngineCall) -> None:
        self.call = call

    def clone(self) -> _Params:
        return _Params(self.call)


class EngineServing(ScriptedServing):
    """Serving classes around a GuardedEngine around the script."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = ScriptedEngine()
        breaker: Any = SimpleNamespace(manifest=manifest(), digest="d" * 64)
        self.guarded: Any = GuardedEngine(self.engine, breaker, "enforce", None, None)

    def parse(self, endpoint: str, data: dict[str, Any], *, max_choices: int) -> EngineCall:
        call = EngineCall(**data)
        call.shape = SimpleNamespace(**{**vars(call.shape), "id": f"chatcmpl-{uuid4().hex}"})
        return call

    async def start(  # type: ignore[override]
        self, call: EngineCall
    ) -> dict[str, Any] | AsyncGenerator[str, None]:
        self.num_started += 1
        outputs = self.guarded.generate("x", _Params(call), call.shape.id)
        if call.streams:
            return self._chunks(call, outputs)
        choice = {"index": 0, "message": {"role": "assistant", "content": ""}}
        async for output in outputs:
            (completion,) = output.outputs
            call.num_delivered += len(completion.token_ids)
            choice["message"]["content"] += call.text * len(completion.token_ids)
            choice["finish_reason"] = completion.finish_reason
        if call.dies:
            raise engine_dead()
        return {"id": call.shape.id, "choices": [choice]}

    async def _chunks(self, call: EngineCall, outputs: Any) -> AsyncGenerator[str, None]:
        self.num_open += 1
        try:
            async for output in outputs:
                (completion,) = output.outputs
                call.num_delivered += len(completion.token_ids)
                delta = {"content": call.text * len(completion.token_ids)}
                choice = {"index": 0, "delta": delta, "finish_reason": completion.finish_reason}
                yield data_event({"id": call.shape.id, "choices": [choice]})
            if call.dies:
                raise engine_dead()
            yield DONE
        finally:
            await outputs.aclose()
            self.num_open -= 1


if __name__ == "__main__":
    serve_script(EngineServing())
