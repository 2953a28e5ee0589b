"""Prometheus series of the guard, next to vLLM's own on the same /metrics.

Every label comes from a closed set: served model, policy, outcome, phase, action. A trip is never
an error; in observe mode the answer is delivered, so the outcome stays `ok`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.guard.decision import GuardReport, Mode, Phase

__all__ = [
    "GuardMetrics",
    "LoadMetrics",
    "Outcome",
    "Refusal",
    "leaked_tokens",
    "was_stopped",
]

Outcome = Literal["ok", "tripped_prompt", "tripped_completion", "rejected", "aborted", "error"]
"""How a completion request ended: rejected is the client's fault, error the server's, aborted a
client that went away."""
Refusal = Literal[
    "rate_limit_exceeded",
    "queue_full",
    "queue_timeout",
    "request_timeout",
    "request_too_large",
    "body_timeout",
    "shutting_down",
]
"""Which limit a request met; the same word as the `code` of its error."""

_SCORE_BUCKETS = (-16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16)
_INDEX_BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_HELD_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)
_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


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
    if was_stopped(report) and report.token_index is not None:
        return report.token_index
    return report.num_scored


class GuardMetrics:
    """The series, in the registry they are given."""

    def __init__(self, registry: CollectorRegistry, *, model: str) -> None:
        self._model = model
        self._policy = "default"
        prefix = "circuit_breakers_"
        self._requests = Counter(
            f"{prefix}requests",
            "Completion requests by how they ended.",
            ("model", "policy", "outcome"),
            registry=registry,
        )
        self._trips = Counter(
            f"{prefix}trips",
            "Tripped streams; action is stopped or observed.",
            ("model", "policy", "phase", "action"),
            registry=registry,
        )
        self._score = Histogram(
            f"{prefix}score",
            "Highest running score of a request, a logit, by phase.",
            ("phase",),
            buckets=_SCORE_BUCKETS,
            registry=registry,
        )
        self._trip_token_index = Histogram(
            f"{prefix}trip_token_index",
            "Position in prompt and completion of the token that tripped.",
            buckets=_INDEX_BUCKETS,
            registry=registry,
        )
        self._ttft = Histogram(
            f"{prefix}delivered_ttft_seconds",
            "Time until the first scored token was handed on.",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._held = Histogram(
            f"{prefix}held_tokens",
            "Scored completion tokens that were withheld from the client, per request.",
            buckets=_HELD_BUCKETS,
            registry=registry,
        )
        self._unscored = Counter(
            f"{prefix}unscored_tokens",
            "Tokens that the model was fed and that came back without a score; must stay 0.",
            registry=registry,
        )
        self._leaked = Counter(
            f"{prefix}leaked_tokens",
            "Completion tokens at or past a trip, or without a score, that were let out; "
            "must stay 0.",
            registry=registry,
        )
        self._info = Gauge(
            f"{prefix}breaker_info",
            "The breaker that is live; always 1.",
            ("artifact", "digest", "base_model", "policy", "mode"),
            registry=registry,
        )
        self._calibration_age = Gauge(
            f"{prefix}calibration_age_seconds",
            "Age of the breaker's calibration.",
            registry=registry,
        )

        self._audit_dropped = Counter(
            f"{prefix}audit_dropped",
            "Entries of the audit log that were lost; must stay 0.",
            registry=registry,
        )
        self._traces_dropped = Counter(
            f"{prefix}traces_dropped",
            "Score traces that were lost while the database was away.",
            registry=registry,
        )
        self._audit_spooled = Gauge(
            f"{prefix}audit_spooled",
            "Entries of the audit log that wait, in the spool or in memory, for its database.",
            registry=registry,
        )
        self._audit_sequence = Gauge(
            f"{prefix}audit_sequence",
            "Number of the newest row that this process has written to the audit log.",
            registry=registry,
        )

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

    def describe_policies(self, names: Iterable[str]) -> None:
        """Announces the policies that requests may run under; they are the label's closed set."""
        # A series that starts at 0 has a rate from its first event on.
        for name in names:
            for outcome in get_args(Outcome):
                self._requests.labels(self._model, name, outcome)
            for phase in get_args(Phase):
                for action in ("stopped", "observed"):
                    self._trips.labels(self._model, name, phase, action)

    def record_outcome(self, outcome: Outcome, policy: str | None = None) -> None:
        """Counts a request; None for a policy that it did not come to have."""
        self._requests.labels(self._model, policy or self._policy, outcome).inc()

    def record_trips(self, reports: Sequence[GuardReport]) -> None:
        """Counts the tripped streams among `reports`."""
        for report in reports:
            if not report.tripped:
                continue
            action = "stopped" if was_stopped(report) else "observed"
            self._trips.labels(self._model, report.policy, report.phase, action).inc()
            if report.token_index is not None:
                self._trip_token_index.observe(report.token_index)

    def record_scores(self, max_scores: dict[Phase, float]) -> None:
        for phase, score in max_scores.items():
            self._score.labels(phase).observe(score)

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


class LoadMetrics:
    """What the limits do; a request that is refused on arrival shows here alone."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
    ) -> None:
        prefix = "circuit_breakers_"
        running = Gauge(
            f"{prefix}running_requests",
            "Requests that the server lets run, the rest of their answer included.",
            registry=registry,
        )
        running.set_function(num_running)
        waiting = Gauge(
            f"{prefix}waiting_requests",
            "Requests that wait for their body or for a place to run.",
            registry=registry,
        )
        waiting.set_function(num_waiting)
        self._refused = Counter(
            f"{prefix}refused_requests",
            "Requests that a limit turned away or ended, by error code.",
            ("reason",),
            registry=registry,
        )
        for reason in get_args(Refusal):
            self._refused.labels(reason)

    def record_refusal(self, reason: Refusal) -> None:
        self._refused.labels(reason).inc()
