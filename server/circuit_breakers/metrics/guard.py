"""What each completion request leaves behind in the metrics, and the breaker that judged it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.guard.decision import GuardReport, Mode, Phase
from circuit_breakers.metrics import series
from circuit_breakers.metrics.drift import DriftWindow
from circuit_breakers.metrics.series import Action, Outcome

__all__ = ["GuardMetrics", "leaked_tokens", "was_stopped"]


def was_stopped(report: GuardReport) -> bool:
    """Whether the trip ended the stream. An unscored token does so in observe mode too."""
    return report.tripped and (report.mode == "enforce" or report.num_unscored > 0)


def leaked_tokens(
    reports: Sequence[GuardReport], num_prompt_tokens: int, num_completion_tokens: int
) -> int:
    """Delivered completion tokens that no verdict covers; must be 0.

    Counts from the outside, on what the response itself says was delivered: a stopped stream may
    deliver tokens up to its trip, any other up to its last scored token.

    Args:
        num_prompt_tokens: summed over the streams of `reports`.
        num_completion_tokens: as in the response's usage.
    """
    covered = sum(_num_covered(report) for report in reports)
    return max(0, num_prompt_tokens + num_completion_tokens - covered)


def _num_covered(report: GuardReport) -> int:
    # In observe mode only a token without a score stops, wherever the first trip was.
    if report.mode == "enforce" and report.tripped and report.token_index is not None:
        return report.token_index
    return report.num_scored


class GuardMetrics:
    """The series, in the registry they are given."""

    def __init__(self, registry: CollectorRegistry, *, model: str) -> None:
        self._model = model
        self._policy = "default"
        self._digest: str | None = None
        self._drift: dict[Phase, dict[str, DriftWindow]] = {}
        """Windows by phase and probe; none for a breaker that records no histogram."""
        self._requests = series.REQUESTS.register(registry)
        self._trips = series.TRIPS.register(registry)
        self._score = series.SCORE.register(registry)
        self._trip_token_index = series.TRIP_TOKEN_INDEX.register(registry)
        self._ttft = series.DELIVERED_TTFT.register(registry)
        self._held = series.HELD_TOKENS.register(registry)
        self._scored = series.SCORED_TOKENS.register(registry)
        self._unscored = series.UNSCORED_TOKENS.register(registry)
        self._leaked = series.LEAKED_TOKENS.register(registry)
        self._score_drift = series.SCORE_DRIFT.register(registry)
        self._drift_requests = series.SCORE_DRIFT_REQUESTS.register(registry)
        self._info = series.BREAKER_INFO.register(registry)
        self._calibration_age = series.CALIBRATION_AGE.register(registry)
        self._audit_dropped = series.AUDIT_DROPPED.register(registry)
        self._traces_dropped = series.TRACES_DROPPED.register(registry)
        self._audit_spooled = series.AUDIT_SPOOLED.register(registry)
        self._audit_sequence = series.AUDIT_SEQUENCE.register(registry)
        self._scored.labels(model)

    def describe_audit(self, num_pending: Callable[[], int], sequence: Callable[[], int]) -> None:
        """Takes the audit log's state at each scrape from these."""
        self._audit_spooled.set_function(num_pending)
        self._audit_sequence.set_function(sequence)

    def describe_breaker(self, manifest: Manifest, digest: str, policy: str, mode: Mode) -> None:
        """Announces the breaker that is live from now on, and the policy of most requests."""
        self._policy = policy
        self.describe_policies([policy])
        for phase in get_args(Phase):
            self._score.labels(phase)
        self._info.clear()
        self._info.labels(manifest.name, digest, manifest.base_model.id, policy, mode).set(1)
        created_s = manifest.created.timestamp()
        self._calibration_age.set_function(lambda: time.time() - created_s)
        if digest != self._digest:
            self._digest = digest
            self._describe_drift(manifest)

    def _describe_drift(self, manifest: Manifest) -> None:
        """Opens a window for every histogram of the breaker."""
        self._drift = {}
        self._score_drift.clear()
        self._drift_requests.clear()
        for probe in manifest.probes:
            for phase, calibrated in (probe.calibration.histogram or {}).items():
                self._drift.setdefault(phase, {})[probe.name] = DriftWindow(calibrated)
        for phase, windows in self._drift.items():
            by_probe = tuple(windows.values())
            self._score_drift.labels(phase).set_function(partial(_largest_index, by_probe))
            self._drift_requests.labels(phase).set_function(partial(_most_requests, by_probe))

    def describe_policies(self, names: Iterable[str]) -> None:
        """Announces the policies that requests may run under; they are the label's closed set."""
        # A series that starts at 0 has a rate from its first event on.
        for name in names:
            for outcome in get_args(Outcome):
                self._requests.labels(self._model, name, outcome)
            for phase in get_args(Phase):
                for action in get_args(Action):
                    self._trips.labels(self._model, name, phase, action)

    def record_outcome(self, outcome: Outcome, policy: str | None = None) -> None:
        """Counts a request; None for a policy that it did not come to have."""
        self._requests.labels(self._model, policy or self._policy, outcome).inc()

    def record_trips(self, reports: Sequence[GuardReport]) -> None:
        """Counts the tripped streams among `reports`."""
        for report in reports:
            if not report.tripped:
                continue
            action: Action = "stopped" if was_stopped(report) else "observed"
            self._trips.labels(self._model, report.policy, report.phase, action).inc()
            if report.token_index is not None:
                self._trip_token_index.observe(report.token_index)

    def record_scores(self, max_scores: dict[Phase, float]) -> None:
        for phase, score in max_scores.items():
            self._score.labels(phase).observe(score)

    def record_unsuspicious(self, peaks: Iterable[Mapping[Phase, Mapping[str, float]]]) -> None:
        """Takes answers that did not trip into the drift of scores.

        Args:
            peaks: highest running score by phase and probe, of each answer.
        """
        for by_phase in peaks:
            for phase, by_probe in by_phase.items():
                for probe, window in self._drift.get(phase, {}).items():
                    if probe in by_probe:
                        window.add(by_probe[probe])

    def record_scored(self, num_tokens: int) -> None:
        self._scored.labels(self._model).inc(num_tokens)

    def record_delivery(self, *, ttft_s: float | None, num_held: int | None) -> None:
        """What the hold-back cost one request; None where nothing can be said."""
        if ttft_s is not None:
            self._ttft.observe(ttft_s)
        if num_held is not None:
            self._held.observe(num_held)

    def record_audit_dropped(self, num: int) -> None:
        self._audit_dropped.inc(num)

    def record_traces_dropped(self, num: int) -> None:
        self._traces_dropped.inc(num)

    def record_faults(self, *, num_unscored: int, num_leaked: int) -> None:
        self._unscored.inc(num_unscored)
        self._leaked.inc(num_leaked)


def _largest_index(windows: Iterable[DriftWindow]) -> float:
    """Of the probe whose scores moved the most; NaN while there is none."""
    known = [window.index for window in windows]
    return max((index for index in known if not math.isnan(index)), default=math.nan)


def _most_requests(windows: Iterable[DriftWindow]) -> float:
    return max(window.num_requests for window in windows)
