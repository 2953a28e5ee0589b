"""From engine core to API process: scores and verdict ride on the request's own output.

They travel in `kv_transfer_params`, the one free dict of an EngineCoreOutput (KV transfer itself is
refused by compat), and are taken out again before anything else reads it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt

from circuit_breakers.engine.score_rows import ScoreRows
from circuit_breakers.guard.decision import Trip

__all__ = ["STOP_REASON", "TokenScores", "attach_scores", "install"]

FloatArray = npt.NDArray[np.float32]

STOP_REASON = "circuit_breaker"
FINISH_REASON = "content_filter"

_WIRE_KEY = "circuit_breakers"
_STATE_ATTRIBUTE = "_circuit_breakers"


class TokenScores:
    """Logits of one stream as delivered so far, in position order."""

    __slots__ = ("_rows", "num_tokens", "trip")

    def __init__(self) -> None:
        self._rows: ScoreRows | None = None
        self.num_tokens = 0
        self.trip: Trip | None = None
        """The engine's verdict; None while it has not stopped the request."""

    @property
    def logit_TP(self) -> FloatArray:
        """float32 (T, P): T positions of prompt + completion, P probes. A copy."""
        return self.rows(0, self.num_tokens)

    def rows(self, start: int, end: int) -> FloatArray:
        """Rows of the positions from `start` to before `end`, as a copy."""
        assert self._rows is not None, "made by the first delivery"
        return self._rows.array(start, end)

    def extend(self, start: int, num_probes: int, raw: bytes, trip: list[Any] | None) -> None:
        """Takes one delivery in.

        Raises:
            RuntimeError: it does not follow the last one; positions would be unscored.
        """
        if start != self.num_tokens:
            raise RuntimeError(f"scores start at token {start}, expected {self.num_tokens}")
        if self._rows is None:
            self._rows = ScoreRows(num_probes)
        self._rows.write(start, raw)
        self.num_tokens = len(self._rows)
        if trip is not None:
            self.trip = Trip(*trip)


def attach_scores(output: Any, start: int, num_probes: int, raw: bytes, trip: Trip | None) -> None:
    """Puts the raw logits of the positions from `start` on on an EngineCoreOutput."""
    output.kv_transfer_params = {
        _WIRE_KEY: [start, num_probes, raw, None if trip is None else list(trip)]
    }


def install() -> None:
    """Wraps vLLM's output processor: completions get `.guard`, trips their finish reason."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    process_outputs = OutputProcessor.process_outputs
    new_completion_output = RequestState._new_completion_output

    @wraps(process_outputs)
    def guarded_process_outputs(
        self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            params = output.kv_transfer_params
            if params is None or _WIRE_KEY not in params:
                continue
            output.kv_transfer_params = None
            state = self.request_states.get(output.request_id)
            if state is not None:
                scores = state.__dict__.setdefault(_STATE_ATTRIBUTE, TokenScores())
                scores.extend(*params[_WIRE_KEY])
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    @wraps(new_completion_output)
    def guarded_completion_output(
        self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any
    ) -> Any:
        completion = new_completion_output(self, token_ids, finish_reason, stop_reason)
        completion.guard = self.__dict__.get(_STATE_ATTRIBUTE)
        if finish_reason is not None and stop_reason == STOP_REASON:
            completion.finish_reason = FINISH_REASON
        return completion

    OutputProcessor.process_outputs = guarded_process_outputs
    RequestState._new_completion_output = guarded_completion_output
