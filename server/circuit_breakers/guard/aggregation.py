"""From token logits to the running score of a stream: the one function that training,
calibration and serving share.

Shapes: T tokens of one stream, in position order; K probes. Token logits are float32; state is
float64 so that the result does not depend on how the stream was cut into chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from circuit_breakers.artifact.manifest import Aggregation

__all__ = ["RunningScore", "RunningScores", "aggregate"]

FloatArray = npt.NDArray[np.float32]


class RunningScore:
    """Running score of one stream under one probe, fed chunk by chunk.

    The score after each token covers all tokens up to and including it. Skipped leading positions
    score -inf, as nothing can be said yet. A NaN token poisons the score from there on: it stays
    NaN, which callers must treat as a trip (fail closed).
    """

    __slots__ = ("_buffer", "_count", "_skip_tokens", "_spec", "_value")

    def __init__(self, spec: Aggregation, *, skip_tokens: int = 0) -> None:
        """Starts before position 0.

        Args:
            skip_tokens: leading positions left out, where that is more than the spec's.
        """
        self._spec = spec
        self._skip_tokens = max(spec.skip_tokens, skip_tokens)
        self._count = 0
        self._value = -np.inf
        self._buffer: deque[float] = deque(maxlen=spec.window or 1)

    @property
    def count(self) -> int:
        """Tokens seen so far, skipped ones included."""
        return self._count

    def update(self, logit_T: FloatArray) -> FloatArray:
        """Running score after each of the next T tokens, float32 (T,)."""
        if self._spec.kind == "max":
            return self._update_max(logit_T)
        score_T = np.empty(len(logit_T), np.float32)
        for t, logit in enumerate(logit_T.tolist()):
            self._count += 1
            if self._count > self._skip_tokens:
                self._advance(logit)
            score_T[t] = self._value
        return score_T

    def _update_max(self, logit_T: FloatArray) -> FloatArray:
        num_skipped = min(max(self._skip_tokens - self._count, 0), len(logit_T))
        self._count += len(logit_T)
        score_T = np.full(len(logit_T), self._value, np.float32)
        # np.maximum, unlike max(), gives NaN whenever one side is NaN.
        score_T[num_skipped:] = np.maximum(
            np.maximum.accumulate(logit_T[num_skipped:]), np.float32(self._value)
        )
        if len(score_T):
            self._value = float(score_T[-1])
        return score_T

    def _advance(self, logit: float) -> None:
        if np.isnan(self._value):
            return
        if self._spec.kind == "ema":
            alpha = self._spec.alpha
            assert alpha is not None
            first = self._value == -np.inf
            self._value = logit if first else self._value + alpha * (logit - self._value)
        else:
            self._buffer.append(logit)
            self._value = sum(self._buffer) / len(self._buffer)


class RunningScores:
    """Running scores of one stream under K probes, fed chunk by chunk."""

    __slots__ = ("_running",)

    def __init__(self, specs: Sequence[Aggregation], *, skip_tokens: int = 0) -> None:
        """Starts before position 0.

        Args:
            specs: of the K probes.
            skip_tokens: leading positions left out, where that is more than a spec's.
        """
        self._running = [RunningScore(spec, skip_tokens=skip_tokens) for spec in specs]

    def update(self, logit_TK: FloatArray) -> FloatArray:
        """Running scores after each of the next T tokens, float32 (T, K)."""
        return np.stack(
            [running.update(logit_TK[:, k]) for k, running in enumerate(self._running)], axis=1
        )


def aggregate(logit_T: FloatArray, spec: Aggregation) -> FloatArray:
    """Running score after each token of a whole stream, float32 (T,)."""
    return RunningScore(spec).update(np.asarray(logit_T, np.float32))
