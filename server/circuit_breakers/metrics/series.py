"""Every series that the server exposes, in one list: what is registered is what is documented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from circuit_breakers.guard.decision import Mode, Phase

__all__ = ["LABEL_VALUES", "PREFIX", "Action", "Outcome", "Refusal", "Series"]

PREFIX: Final = "circuit_breakers_"

Outcome = Literal["ok", "tripped_prompt", "tripped_completion", "rejected", "aborted", "error"]
"""How a completion request ended: rejected is the client's fault, error the server's, aborted a
client that went away."""
Action = Literal["stopped", "observed"]
"""What a trip did."""
Refusal = Literal[
    "rate_limit_exceeded",
    "queue_full",
    "queue_timeout",
    "request_timeout",
    "request_too_large",
    "body_timeout",
    "shutting_down",
    "not_ready",
    "unauthenticated",
    "forbidden",
]
"""Which limit a request met, the same word as the `code` of its error; or that its key did not let
it in."""

LABEL_VALUES: Final[dict[str, tuple[str, ...] | str]] = {
    "model": "the name that the model is served under",
    "policy": "names of the policies in force",
    "outcome": get_args(Outcome),
    "phase": get_args(Phase),
    "action": get_args(Action),
    "reason": get_args(Refusal),
    "artifact": "name of the breaker",
    "digest": "SHA-256 of its manifest",
    "base_model": "the model that it was made for",
    "mode": get_args(Mode),
}
"""The closed set of each label, or where it comes from."""

_SCORE_BUCKETS = (-16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16)
_INDEX_BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_HELD_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)
_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

M = TypeVar("M", Counter, Gauge, Histogram)


@dataclass(frozen=True, kw_only=True)
class Series(Generic[M]):
    """One series."""

    kind: type[M]
    name: str
    """Without the prefix, and without a counter's `_total`."""
    unit: str
    meaning: str
    """One sentence; Prometheus shows it too."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram."""
    holds: str = ""
    """What is true of it while all is well."""

    @property
    def exposed_name(self) -> str:
        """The name to query; a histogram's goes with _bucket, _sum and _count."""
        return f"{PREFIX}{self.name}{'_total' if self.kind is Counter else ''}"

    def register(self, registry: CollectorRegistry) -> M:
        """The series in `registry`."""
        more: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        return self.kind(
            f"{PREFIX}{self.name}", self.meaning, self.labels, registry=registry, **more
        )


REQUESTS: Final = Series(
    kind=Counter,
    name="requests",
    unit="requests",
    meaning="Completion requests by how they ended.",
    labels=("model", "policy", "outcome"),
    holds="`error` is rare; a trip is no error",
)
TRIPS: Final = Series(
    kind=Counter,
    name="trips",
    unit="streams",
    meaning="Tripped streams, by what the trip did.",
    labels=("model", "policy", "phase", "action"),
    holds="`stopped` alone in mode enforce; near the promised rate on benign traffic",
)
SCORE: Final = Series(
    kind=Histogram,
    name="score",
    unit="logit",
    meaning="Highest running score of a request, by phase.",
    labels=("phase",),
    buckets=_SCORE_BUCKETS,
)
TRIP_TOKEN_INDEX: Final = Series(
    kind=Histogram,
    name="trip_token_index",
    unit="tokens",
    meaning="Position in prompt and completion of the token that tripped.",
    buckets=_INDEX_BUCKETS,
)
DELIVERED_TTFT: Final = Series(
    kind=Histogram,
    name="delivered_ttft_seconds",
    unit="seconds",
    meaning="Time until the first scored token was handed on.",
    buckets=_TTFT_BUCKETS_S,
    holds="close to vLLM's own time to the first token: one step more",
)
HELD_TOKENS: Final = Series(
    kind=Histogram,
    name="held_tokens",
    unit="tokens",
    meaning="Scored completion tokens that were withheld from the client, per request.",
    buckets=_HELD_BUCKETS,
)
SCORED_TOKENS: Final = Series(
    kind=Counter,
    name="scored_tokens",
    unit="tokens",
    meaning="Tokens of prompts and completions that were scored, of requests that ended; "
    "those of canaries, too.",
    labels=("model",),
    holds="rises when `vllm:generation_tokens_total` does, or the probe is dead",
)
UNSCORED_TOKENS: Final = Series(
    kind=Counter,
    name="unscored_tokens",
    unit="tokens",
    meaning="Tokens that the model was fed and that came back without a score; must stay 0.",
    holds="0",
)
LEAKED_TOKENS: Final = Series(
    kind=Counter,
    name="leaked_tokens",
    unit="tokens",
    meaning="Completion tokens at or past a trip, or without a score, that were let out; "
    "must stay 0.",
    holds="0",
)
SCORE_DRIFT: Final = Series(
    kind=Gauge,
    name="score_drift",
    unit="index",
    meaning="Population stability index of the scores of answers that did not trip, against the "
    "breaker's calibration; NaN until there are enough of them.",
    labels=("phase",),
    holds="below 0.1; from 0.25 on the thresholds' promise is about other traffic than this. "
    "Absent where the breaker records no calibration histogram",
)
SCORE_DRIFT_REQUESTS: Final = Series(
    kind=Gauge,
    name="score_drift_requests",
    unit="answers",
    meaning="Answers that score_drift is taken over, the newest ones; a request with several "
    "choices has several.",
    labels=("phase",),
)
BREAKER_INFO: Final = Series(
    kind=Gauge,
    name="breaker_info",
    unit="1",
    meaning="The breaker that is live; always 1.",
    labels=("artifact", "digest", "base_model", "policy", "mode"),
    holds="one of it on each server, and the same on all",
)
CALIBRATION_AGE: Final = Series(
    kind=Gauge,
    name="calibration_age_seconds",
    unit="seconds",
    meaning="Age of the breaker's calibration.",
    holds="what your own policy for recalibration says",
)
AUDIT_DROPPED: Final = Series(
    kind=Counter,
    name="audit_dropped",
    unit="entries",
    meaning="Entries of the audit log that were lost; must stay 0.",
    holds="0",
)
TRACES_DROPPED: Final = Series(
    kind=Counter,
    name="traces_dropped",
    unit="traces",
    meaning="Score traces that were lost while the database was away.",
)
AUDIT_SPOOLED: Final = Series(
    kind=Gauge,
    name="audit_spooled",
    unit="entries",
    meaning="Entries of the audit log that wait, in the spool or in memory, for its database.",
    holds="falls back to 0",
)
AUDIT_SEQUENCE: Final = Series(
    kind=Gauge,
    name="audit_sequence",
    unit="rows",
    meaning="Number of the newest row that this process has written to the audit log.",
    holds="never falls while the process runs",
)
RUNNING_REQUESTS: Final = Series(
    kind=Gauge,
    name="running_requests",
    unit="requests",
    meaning="Requests that the server lets run, the rest of their answer included.",
    holds="at most `--max-concurrent-requests`",
)
WAITING_REQUESTS: Final = Series(
    kind=Gauge,
    name="waiting_requests",
    unit="requests",
    meaning="Requests that wait for their body or for a place to run.",
    holds="at most `--max-queued-requests`",
)
REFUSED_REQUESTS: Final = Series(
    kind=Counter,
    name="refused_requests",
    unit="requests",
    meaning="Requests that a limit turned away or ended, or that had no key to be let in, by "
    "reason.",
    labels=("reason",),
)
READY: Final = Series(
    kind=Gauge,
    name="ready",
    unit="1 or 0",
    meaning="Whether /readyz answers 200.",
    holds="1 from the end of the start to the shutdown",
)
CANARY_OK: Final = Series(
    kind=Gauge,
    name="canary_ok",
    unit="1 or 0",
    meaning="Whether every canary had the verdict of its label when they last ran; NaN before.",
    holds="1; at 0 the server is not ready and refuses requests",
)
CANARY_FAILURES: Final = Series(
    kind=Counter,
    name="canary_failures",
    unit="runs",
    meaning="Runs of the canaries in which one failed.",
    holds="0",
)
CANARY_LAST_RUN: Final = Series(
    kind=Gauge,
    name="canary_last_run_timestamp_seconds",
    unit="seconds since 1970",
    meaning="When a run of the canaries last ended; NaN before.",
    holds="no older than a few times the interval",
)
CANARY_INTERVAL: Final = Series(
    kind=Gauge,
    name="canary_interval_seconds",
    unit="seconds",
    meaning="Pause between two runs of the canaries; 0 when they only run at the start.",
)
