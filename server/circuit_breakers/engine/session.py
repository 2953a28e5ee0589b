"""GuardSession: what the guard saw of one HTTP request, each of whose choices is a stream.

The session is found through the context: GuardedEngine.generate() opens its streams in the one
that its caller runs in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from circuit_breakers.engine.delivery import TokenScores
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import GuardReport, Phase, Trip
from circuit_breakers.guard.margins import margins
from circuit_breakers.guard.policy import Policy

__all__ = [
    "ChoiceStream",
    "GuardSession",
    "current_session",
    "governed_by",
    "guard_session",
]


class ChoiceStream:
    """One choice of one request, seen from the API process; each of its scores is judged once.

    Nearly all of them cannot trip, as the policy's screen can tell. Those wait for the state
    machine until a token that could, or until somebody asks what it saw.
    """

    def __init__(self, policy: Policy, num_prompt_tokens: int) -> None:
        self.policy = policy
        self._breaker = StreamBreaker(policy, num_prompt_tokens)
        self.num_prompt_tokens = num_prompt_tokens
        self.scores: TokenScores | None = None
        """Logits delivered so far; None before the first ones."""
        self._num_waiting = 0
        """Positions that have passed and that the state machine has not seen."""
        self._watch_to = 0
        """Positions before this one may trip, as far as the screen can tell."""
        self.num_delivered = 0
        """Completion tokens passed on."""
        self.stopped = False
        """The engine stopped it for a trip."""
        self.finish_reason: str | None = None
        """Why it ended; None while it runs."""
        self.prompt_token_ids: Sequence[int] = ()
        self.params: Any = None
        """vLLM's sampling parameters of it."""

    @property
    def breaker(self) -> StreamBreaker:
        """The state machine, up to the last judged position."""
        self._catch_up()
        return self._breaker

    @property
    def num_judged(self) -> int:
        """Positions that have their verdict."""
        return self._breaker.num_seen + self._num_waiting

    @property
    def trip(self) -> Trip | None:
        """The first trip; None until then."""
        return self._breaker.trip

    @property
    def num_scored(self) -> int:
        """Positions that have a score."""
        return self._breaker.num_scored + self._num_waiting

    @property
    def stopped_in_prompt(self) -> bool:
        """The engine stopped it before its completion. A trip that was only observed may be
        earlier than the token that stopped."""
        return self.stopped and self.num_judged <= self.num_prompt_tokens

    def judge(self, scores: TokenScores) -> None:
        """Verdict on whatever was delivered since the last call."""
        self.scores = scores
        self.stopped = scores.trip is not None
        start, end = self.num_judged, scores.num_tokens
        if start == end:
            return
        self._num_waiting += end - start
        if not self.policy.screen.is_harmless(scores.rows(start, end)):
            self._watch_to = end + self.policy.longest_window - 1
        if start < self._watch_to:
            self._catch_up()

    def _catch_up(self) -> None:
        if self._num_waiting:
            assert self.scores is not None, "they wait there"
            logit_TP = self.scores.rows(self._breaker.num_seen, self.num_judged)
            self._num_waiting = 0
            self._breaker.update(logit_TP)


class GuardSession:
    """What the guard saw while one HTTP request was handled; a request may have many streams."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or _governing.get()
        """What every stream is judged by; None leaves it to the engine's own policy."""
        self._streams: dict[int, ChoiceStream] = {}
        self._num_choices = 0
        self.error: Exception | None = None
        """What broke a generate() call off, for routes of vLLM's that do not hand it on."""
        self._started_s = time.monotonic()
        self.first_delivery_s: float | None = None
        """Seconds from the session's start to the first delivered token."""
        self.num_leaked = 0
        """Tokens at or past a trip that reached this layer in enforce mode; must stay 0."""
        self._num_unscored_within = 0
        self.num_scored_within = 0
        """Tokens that were scored in sessions of its parts."""
        self.request_ids: list[str] = []
        """vLLM's, of the generate() calls made so far."""

    def reports(self) -> list[GuardReport]:
        """One report for each choice that ran, in order of choice."""
        return [self._streams[choice].breaker.report() for choice in self.choices]

    @property
    def choices(self) -> list[int]:
        """Numbers of the choices that ran; those of `reports`."""
        return sorted(self._streams)

    def report_for(self, choice: int) -> GuardReport | None:
        """The report of choice `choice` of the response; None when it has not run.

        Several prompts of one completion request number their choices through.
        """
        stream = self._streams.get(choice)
        return None if stream is None else stream.breaker.report()

    def stream_for(self, choice: int) -> ChoiceStream | None:
        """The stream of choice `choice` of the response; None when it has not run."""
        return self._streams.get(choice)

    def finish_reason_for(self, choice: int) -> str | None:
        """Why choice `choice` ended; None while it runs or when it has not run."""
        stream = self._streams.get(choice)
        return None if stream is None else stream.finish_reason

    @property
    def prompt_tripped(self) -> GuardReport | None:
        """The report of a stream whose prompt tripped and was stopped; None without one."""
        return next(map(self.report_for, self.stopped_in_prompt), None)

    @property
    def stopped_in_prompt(self) -> list[int]:
        """Choices that were stopped on their prompt, and deliver nothing."""
        return [n for n, stream in self._streams.items() if stream.stopped_in_prompt]

    @property
    def stopped(self) -> GuardReport | None:
        """The report of the first stream that a trip ended; None without one."""
        for choice in sorted(self._streams):
            if self._streams[choice].stopped:
                return self._streams[choice].breaker.report()
        return None

    def judged_choices(self) -> set[int]:
        """Choices whose prompt has its verdict: all of it was judged, or it was stopped within."""
        return {
            choice
            for choice, stream in self._streams.items()
            if stream.stopped or stream.num_judged >= stream.num_prompt_tokens
        }

    def margins_for(self, choice: int, phase: Phase) -> dict[str, float] | None:
        """By probe, how far a choice's highest score of a phase lies above its threshold.

        None when the choice has not run, or when a token of it came back without a score.
        """
        stream = self._streams.get(choice)
        if stream is None or stream.scores is None or stream.breaker.num_unscored:
            return None
        logit_TP = stream.scores.logit_TP
        return margins(stream.policy, logit_TP, stream.num_prompt_tokens, phase)

    @property
    def num_stopped_prompt_tokens(self) -> int:
        """Prompt tokens of the choices that were stopped on their prompt."""
        return sum(self._streams[choice].num_prompt_tokens for choice in self.stopped_in_prompt)

    @property
    def max_scores(self) -> dict[Phase, float]:
        """Highest running score by phase, over all streams; a phase without scores is absent."""
        peaks: dict[Phase, float] = {}
        for stream in self._streams.values():
            for phase, peak in stream.breaker.phase_peaks.items():
                peaks[phase] = max(peak, peaks.get(phase, peak))
        return peaks

    @property
    def probe_peaks(self) -> dict[str, dict[str, float]]:
        """Highest running score by phase and probe, over all streams."""
        peaks: dict[str, dict[str, float]] = {}
        for stream in self._streams.values():
            for phase, by_probe in stream.breaker.probe_peaks.items():
                known = peaks.setdefault(phase, {})
                for probe, peak in by_probe.items():
                    known[probe] = max(peak, known.get(probe, peak))
        return peaks

    def untripped_peaks(self) -> list[dict[Phase, dict[str, float]]]:
        """Highest running score by phase and probe of each stream that did not trip.

        As calibration takes them: those whose scores started with the completion are left out.
        """
        return [
            stream.breaker.probe_peaks
            for stream in self._streams.values()
            if stream.breaker.trip is None and "prompt" in stream.policy.phases
        ]

    @property
    def thresholds(self) -> dict[str, float]:
        """Lowest threshold that a stream was under, by probe."""
        lowest: dict[str, float] = {}
        for stream in self._streams.values():
            for probe, threshold in stream.breaker.thresholds.items():
                lowest[probe] = min(threshold, lowest.get(probe, threshold))
        return lowest

    @property
    def num_prompt_tokens(self) -> int:
        """Summed over the streams: a prompt with n choices counts n times."""
        return sum(s.num_prompt_tokens for s in self._streams.values())

    @property
    def num_delivered_tokens(self) -> int:
        return sum(s.num_delivered for s in self._streams.values())

    @property
    def num_unscored(self) -> int:
        own = sum(stream.breaker.num_unscored for stream in self._streams.values())
        return own + self._num_unscored_within

    def add_request(self, num_choices: int) -> int:
        """Opens the next generate() call; the response's number of its first choice."""
        first = self._num_choices
        self._num_choices += num_choices
        return first

    def stream(self, policy: Policy, choice: int, num_prompt_tokens: int) -> ChoiceStream:
        if choice not in self._streams:
            self._streams[choice] = ChoiceStream(policy, num_prompt_tokens)
        return self._streams[choice]

    def add_faults(self, within: GuardSession) -> None:
        """Counts what must never happen in a session that a part of the request had of its own."""
        self.num_leaked += within.num_leaked
        self._num_unscored_within += within.num_unscored
        self.num_scored_within += sum(report.num_scored for report in within.reports())

    def delivered(self) -> None:
        if self.first_delivery_s is None:
            self.first_delivery_s = time.monotonic() - self._started_s


_session: ContextVar[GuardSession | None] = ContextVar("circuit_breakers_session", default=None)
_governing: ContextVar[Policy | None] = ContextVar("circuit_breakers_policy", default=None)


@contextmanager
def governed_by(policy: Policy | None) -> Iterator[None]:
    """Every session that is opened inside has this policy, unless it is given one of its own."""
    token = _governing.set(policy)
    try:
        yield
    finally:
        _governing.reset(token)


def current_session() -> GuardSession | None:
    """The session that generate() calls made here belong to."""
    return _session.get()


@contextmanager
def guard_session(policy: Policy | None = None) -> Iterator[GuardSession]:
    """Collects every generate() call made inside into one session.

    Args:
        policy: what its streams are judged by; None takes that of `governed_by`, or else the
            engine's own.
    """
    session = GuardSession(policy)
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)
