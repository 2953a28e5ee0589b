"""One request's entry in the metrics, made exactly once, however the request ends."""

from __future__ import annotations

from typing import NamedTuple

from circuit_breakers.api.errors import ApiError
from circuit_breakers.engine.guarded import GuardSession
from circuit_breakers.metrics import GuardMetrics, Outcome, leaked_tokens, was_stopped

__all__ = ["RequestRecord", "Usage"]


class Usage(NamedTuple):
    """What a response says was read and written, in tokens."""

    num_prompt_tokens: int
    """Summed over the streams: a prompt with n choices counts n times."""
    num_completion_tokens: int


class RequestRecord:
    """What is known of one completion request; written to the metrics by the first `finish`."""

    def __init__(self, metrics: GuardMetrics) -> None:
        self._metrics = metrics
        self._finished = False
        self.session: GuardSession | None = None
        """Set once generation may start."""

    def complete(self, usage: Usage | None) -> None:
        """The response was delivered to its end."""
        assert self.session is not None, "a response comes out of a session"
        stopped = any(was_stopped(report) for report in self.session.reports())
        self.finish("tripped_completion" if stopped else "ok", usage)

    def fail(self, error: ApiError) -> None:
        """The request was answered with an error."""
        if error.guard is not None:
            self.finish("tripped_prompt")
        else:
            self.finish("rejected" if error.status < 500 else "error")

    def finish(self, outcome: Outcome, usage: Usage | None = None) -> None:
        """Writes the entry; later calls change nothing."""
        if self._finished:
            return
        self._finished = True
        self._metrics.record_outcome(outcome)
        if self.session is not None:
            self._record_session(self.session, outcome, usage)

    def _record_session(self, session: GuardSession, outcome: Outcome, usage: Usage | None) -> None:
        reports = session.reports()
        prompt_trip = session.prompt_tripped
        # The client of a refused prompt sees one trip, however many choices were asked for.
        refused = outcome == "tripped_prompt" and prompt_trip is not None
        self._metrics.record_trips([prompt_trip] if refused and prompt_trip else reports)
        self._metrics.record_scores(session.max_scores)
        num_leaked, num_held = session.num_leaked, None
        if usage is not None:
            num_leaked += leaked_tokens(reports, *usage)
            num_held = max(0, sum(report.num_scored for report in reports) - sum(usage))
        self._metrics.record_delivery(ttft_s=session.first_delivery_s, num_held=num_held)
        self._metrics.record_faults(num_unscored=session.num_unscored, num_leaked=num_leaked)
