"""One request's entry in metrics and audit log, made exactly once, however the request ends.

Its trips are in the log before its client knows of them: what a client was told of survives a
kill -9 of the server.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from circuit_breakers.api.endpoints import Endpoint
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.request_summary import RequestSummary
from circuit_breakers.api.trail import AuditTrail, RequestIdentity
from circuit_breakers.engine.session import GuardSession
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import GuardMetrics, Outcome, leaked_tokens, was_stopped

__all__ = ["RequestRecord", "Usage"]


class Usage(NamedTuple):
    """What a response says was read and written, in tokens."""

    num_prompt_tokens: int
    """Summed over the streams: a prompt with n choices counts n times."""
    num_completion_tokens: int


class RequestRecord:
    """What is known of one completion request; written down by the first `finish`."""

    def __init__(
        self,
        metrics: GuardMetrics,
        trail: AuditTrail,
        *,
        model: str,
        listeners: Iterable[Callable[[RequestSummary], None]] = (),
        trace_headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts the request's clock.

        Args:
            listeners: are told of it once, when it has ended.
            trace_headers: of the request.
        """
        self._metrics = metrics
        self._trail = trail
        self._listeners = tuple(listeners)
        self._trace_headers = trace_headers
        self._started_ns = time.time_ns()
        self._started_s = time.monotonic()
        self._error_code: str | None = None
        self._finished = False
        self._ended: set[int] = set()
        """Choices whose end was looked at."""
        self._logged: set[int | None] = set()
        """Choices whose trips the log has."""
        self._is_written = True
        """No trip of it was logged since the log was last on the disk."""
        self.request_id = f"req-{secrets.token_hex(16)}"
        """Goes out as x-request-id; the response's own id as soon as there is one."""
        self.key_id = "anonymous"
        """Public id of the caller's API key."""
        self.model = model
        """The name that the request is served under."""
        self.endpoint: Endpoint | Literal["moderation"] = "chat"
        self.choices_per_prompt = 1
        self.session: GuardSession | None = None
        """Set once generation may start."""

    def complete(self, usage: Usage | None) -> None:
        """The response was delivered to its end."""
        assert self.session is not None, "a response comes out of a session"
        self.finish(self._trip_outcome() or "ok", usage)

    def break_off(self) -> None:
        """A stream ended with an error event: that of a trip, or a fault."""
        self.finish(self._trip_outcome() or "error")

    def fail(self, error: ApiError) -> None:
        """The request was answered with an error."""
        self._error_code = error.code
        if error.guard is not None:
            in_answer = error.guard.phase == "completion"
            by_report: Outcome = "tripped_completion" if in_answer else "tripped_prompt"
            # The report is of the first trip, which may be one that was only observed.
            self.finish(self._trip_outcome() or by_report)
        else:
            self.finish("rejected" if error.status < 500 else "error")

    def _trip_outcome(self) -> Outcome | None:
        if self.session is None or not any(map(was_stopped, self.session.reports())):
            return None
        return "tripped_prompt" if self.session.prompt_tripped else "tripped_completion"

    def finish(self, outcome: Outcome, usage: Usage | None = None) -> None:
        """Writes the entry; later calls change nothing."""
        if self._finished:
            return
        self._finished = True
        policy = self.session.policy if self.session else None
        self._metrics.record_outcome(outcome, policy.name if policy else None)
        reports: list[GuardReport] = []
        trips: list[tuple[int | None, GuardReport]] = []
        if self.session is not None:
            reports = self.session.reports()
            trips = self._trips(self.session, reports, outcome, usage)
            self._record_session(self.session, reports, trips, outcome, usage)
        summary = self._summary(outcome, reports, trips)
        for tell in self._listeners:
            tell(summary)

    async def settle(self) -> None:
        """On return the client may be told of what has ended so far, as the log has its trips."""
        if not self._finished and self.session is not None:
            for choice in self.session.choices:
                if choice in self._ended or self.session.finish_reason_for(choice) is None:
                    continue
                self._ended.add(choice)
                report = self.session.report_for(choice)
                assert report is not None, "it ran"
                self._log([(choice, report)])
        if not self._is_written:
            await self._trail.written()
            self._is_written = True

    def _log(self, trips: Iterable[tuple[int | None, GuardReport]]) -> None:
        new = [(choice, r) for choice, r in trips if r.tripped and choice not in self._logged]
        if new:
            self._trail.record_trips(RequestIdentity(self.request_id, self.key_id, self.model), new)
            self._logged.update(choice for choice, _ in new)
            self._is_written = False

    def _summary(
        self,
        outcome: Outcome,
        reports: Iterable[GuardReport],
        trips: Iterable[tuple[int | None, GuardReport]],
    ) -> RequestSummary:
        session = self.session or GuardSession()
        policy = session.policy.name if session.policy else None
        report = max(reports, key=_closeness, default=None)
        reasons = (session.finish_reason_for(choice) for choice in session.choices)
        return RequestSummary(
            request_id=self.request_id,
            key_id=self.key_id,
            model=self.model,
            endpoint=self.endpoint,
            outcome=outcome,
            error=self._error_code,
            started_ns=self._started_ns,
            duration_s=time.monotonic() - self._started_s,
            ttft_s=session.first_delivery_s,
            num_prompt_tokens=session.num_prompt_tokens // self.choices_per_prompt,
            num_completion_tokens=session.num_delivered_tokens,
            finish_reasons=tuple(reason for reason in reasons if reason is not None),
            policy=report.policy if report else policy,
            report=report,
            trips=tuple(trips),
            trace_headers=self._trace_headers,
        )

    def _trips(
        self,
        session: GuardSession,
        reports: list[GuardReport],
        outcome: Outcome,
        usage: Usage | None,
    ) -> list[tuple[int | None, GuardReport]]:
        """Number of choice and report of each stream that tripped."""
        prompt_trip = session.prompt_tripped
        # The client of a prompt that is answered with an error sees one trip, however many choices
        # were asked for.
        is_refused = outcome == "tripped_prompt" and usage is None and not self._logged
        if is_refused and prompt_trip is not None:
            return [(None, prompt_trip)]
        by_choice = zip(session.choices, reports, strict=True)
        return [(choice, report) for choice, report in by_choice if report.tripped]

    def _record_session(
        self,
        session: GuardSession,
        reports: list[GuardReport],
        trips: list[tuple[int | None, GuardReport]],
        outcome: Outcome,
        usage: Usage | None,
    ) -> None:
        self._metrics.record_trips([report for _, report in trips])
        self._log(trips)
        who = RequestIdentity(self.request_id, self.key_id, self.model)
        self._trail.record_scores(who, session, reports, outcome)
        self._metrics.record_scores(session.max_scores)
        num_scored = sum(report.num_scored for report in reports)
        self._metrics.record_scored(num_scored + session.num_scored_within)
        if outcome == "ok" and self.endpoint != "moderation":
            self._metrics.record_unsuspicious(session.untripped_peaks())
        num_leaked, num_held = session.num_leaked, None
        if usage is not None:
            # The usage has the whole of a prompt, its verdict covers what came before the trip.
            num_prompt_tokens = usage.num_prompt_tokens - session.num_stopped_prompt_tokens
            num_completion_tokens = usage.num_completion_tokens
            stopped = session.stopped_in_prompt
            by_choice = zip(session.choices, reports, strict=True)
            ran = [report for choice, report in by_choice if choice not in stopped]
            num_leaked += leaked_tokens(ran, num_prompt_tokens, num_completion_tokens)
            num_scored = sum(report.num_scored for report in ran)
            num_held = max(0, num_scored - num_prompt_tokens - num_completion_tokens)
        self._metrics.record_delivery(ttft_s=session.first_delivery_s, num_held=num_held)
        self._metrics.record_faults(num_unscored=session.num_unscored, num_leaked=num_leaked)


def _closeness(report: GuardReport) -> tuple[bool, float]:
    """Orders reports by how close they came to a trip."""
    if report.score is None or report.threshold is None:
        return report.tripped, -math.inf
    return report.tripped, report.score - report.threshold
