"""StreamBreaker: the state machine that turns one stream's token logits into a verdict.

The engine core runs one per request to stop it; the API process runs another on the delivered
scores to report and to double-check. Both see the same numbers, so both reach the same verdict.

Shapes: T new tokens, K probes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from circuit_breakers.guard.decision import GuardReport, Phase, Trip
from circuit_breakers.guard.policy import Policy

__all__ = ["StreamBreaker"]

FloatArray = npt.NDArray[np.float32]


class StreamBreaker:
    """Judges one stream, chunk by chunk, in position order. Trips once and stays tripped."""

    __slots__ = (
        "_num_prompt_tokens",
        "_peak_K",
        "_peak_index_K",
        "_phase_peak_K",
        "_policy",
        "_running",
        "_threshold_K",
        "num_scored",
        "num_unscored",
        "trip",
    )

    def __init__(self, policy: Policy, num_prompt_tokens: int) -> None:
        self._policy = policy
        self._num_prompt_tokens = num_prompt_tokens
        self._running = policy.running_scores(num_prompt_tokens)
        self._threshold_K = policy.threshold_K
        self._peak_K = np.full(len(policy.probes), -np.inf, np.float32)
        self._peak_index_K = np.zeros(len(policy.probes), np.int64)
        self.trip: Trip | None = None
        """The first trip; None until then."""
        self.num_scored = 0
        self.num_unscored = 0
        self._phase_peak_K: dict[Phase, FloatArray] = {}

    @property
    def num_seen(self) -> int:
        """Tokens judged so far, scored or not."""
        return self.num_scored + self.num_unscored

    @property
    def phase_peaks(self) -> dict[Phase, float]:
        """Highest running score of any probe, by phase; a phase without scores is absent."""
        peaks = {phase: float(peak_K.max()) for phase, peak_K in self._phase_peak_K.items()}
        return {phase: peak for phase, peak in peaks.items() if peak > -np.inf}

    @property
    def probe_peaks(self) -> dict[Phase, dict[str, float]]:
        """Highest running score by phase and probe; what has no score is absent."""
        names = [probe.name for probe in self._policy.probes]
        return {
            phase: {n: p for n, p in zip(names, peak_K.tolist(), strict=True) if p > -np.inf}
            for phase, peak_K in self._phase_peak_K.items()
        }

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold in force, by probe; one that is not judged is absent."""
        return {
            self._policy.probes[k].name: float(self._threshold_K[k])
            for k in self._policy.judged_columns
        }

    def update(self, logit_TK: FloatArray) -> Trip | None:
        """Judges the next T tokens; the trip if this call caused it.

        A token without a finite score trips at once, whatever the aggregation: fail closed. It
        is returned even by a stream that has tripped before, as observe mode lets that go on.

        Args:
            logit_TK: float32 logits of the next T tokens under K probes.
        """
        num_tokens = len(logit_TK)
        if num_tokens == 0:
            return None
        start = self.num_seen
        score_TK = self._running.update(logit_TK)
        unscored_T = np.asarray((~np.isfinite(logit_TK)).any(axis=1))
        num_unscored = int(unscored_T.sum())
        self.num_unscored += num_unscored
        self.num_scored += num_tokens - num_unscored
        self._record_peaks(start, score_TK)
        if self.trip is not None:
            over_TK = np.broadcast_to(unscored_T[:, None], score_TK.shape)
        else:
            # `not <` rather than `>=`, so that NaN counts.
            over_TK = ~(score_TK < self._threshold_K)
            if "completion" not in self._policy.phases:
                over_TK[max(self._num_prompt_tokens - start, 0) :] = False
            over_TK |= unscored_T[:, None]
        over_T = over_TK.any(axis=1)
        if not over_T.any():
            return None
        t = int(over_T.argmax())
        k = int(over_TK[t].argmax())
        trip = Trip(
            probe=self._policy.probes[k].name,
            score=float("nan") if unscored_T[t] else float(score_TK[t, k]),
            threshold=float(np.float32(self._policy.probes[k].threshold_logit)),
            token_index=start + t,
            phase="prompt" if start + t < self._num_prompt_tokens else "completion",
        )
        self.trip = self.trip or trip
        return trip

    def report(self) -> GuardReport:
        """What was seen so far."""
        trip = self.trip
        judged = self._policy.judged_columns
        k = int(judged[(self._peak_K[judged] - self._threshold_K[judged]).argmax()])
        peak = float(self._peak_K[k])
        known = peak > -np.inf
        score = peak if trip is None else trip.score
        return GuardReport(
            breaker=self._policy.breaker,
            policy=self._policy.name,
            mode=self._policy.mode,
            tripped=trip is not None,
            phase=trip.phase if trip else None,
            probe=trip.probe if trip else (self._policy.probes[k].name if known else None),
            # JSON has no NaN and no infinity.
            score=score if np.isfinite(score) else None,
            threshold=trip.threshold if trip else float(self._threshold_K[k]),
            token_index=trip.token_index
            if trip
            else (int(self._peak_index_K[k]) if known else None),
            num_scored=self.num_scored,
            num_unscored=self.num_unscored,
        )

    def _record_peaks(self, start: int, score_TK: FloatArray) -> None:
        finite_TK = np.where(np.isnan(score_TK), -np.inf, score_TK)
        split = min(max(self._num_prompt_tokens - start, 0), len(finite_TK))
        judged_TK = finite_TK if "completion" in self._policy.phases else finite_TK[:split]
        best_K = judged_TK.max(axis=0, initial=-np.inf)
        newer_K = best_K > self._peak_K
        if newer_K.any():
            self._peak_index_K[newer_K] = start + judged_TK.argmax(axis=0)[newer_K]
            self._peak_K[newer_K] = best_K[newer_K]
        phases: tuple[tuple[Phase, FloatArray], ...] = (
            ("prompt", finite_TK[:split]),
            ("completion", finite_TK[split:]),
        )
        for phase, part_TK in phases:
            if part_TK.size:
                peak_K = part_TK.max(axis=0)
                known_K = self._phase_peak_K.setdefault(phase, peak_K)
                np.maximum(known_K, peak_K, out=known_K)
