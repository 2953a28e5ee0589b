"""What an answer says of its guard, whole or chunk by chunk, and what to do about it.

chat completions, completions   `guard` on each choice and on the body, or the chunk that ends it
responses                       `guard` on the response, in a stream on the last event's
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import openai

from circuit_breakers_client.errors import TrippedError, UnguardedError
from circuit_breakers_client.report import GuardReport, field_of, parse_report, worst

__all__ = ["OnTrip", "Rules", "StreamWatch", "guard_in", "is_guarded"]

OnTrip = Literal["return", "raise"]
"""A stopped answer is returned as openai's clients return it, or raised as TrippedError."""

_LAST_EVENTS = ("response.completed", "response.incomplete")
_GUARDED_PATH = re.compile(
    r"/(completions|responses)(/(?!(input_tokens|render)/*$)[^/]+(/cancel)?)?/*$"
)
"""What is made, kept, cancelled or compacted; input_tokens counts, and render makes token ids."""
_OTHER_TEXT = ("reasoning", "reasoning_content", "refusal", "tool_calls", "function_call")
_NO_CHOICE = -1


def is_guarded(method: str, path: str) -> bool:
    """Whether a request makes the model's text, or gives out text that was made."""
    place = re.split(r"[?#]", path, maxsplit=1)[0]
    return method.upper() in ("GET", "POST") and _GUARDED_PATH.search(place) is not None


def guard_in(answer: object) -> GuardReport | None:
    """The report of a whole answer, a choice, a chunk, an event, or an error's JSON."""
    for place in (answer, field_of(answer, "response"), field_of(answer, "error")):
        if (report := parse_report(field_of(place, "guard"))) is not None:
            return report
    return None


class Rules(NamedTuple):
    """What a client does with what it finds."""

    on_trip: OnTrip
    require_guard: bool

    def check_whole(self, body: object) -> None:
        """Passes an answer that is complete.

        Raises:
            TrippedError: it was stopped, and on_trip is "raise".
            UnguardedError: it has no report, and one is required.
        """
        report = guard_in(body)
        if report is None:
            self.miss("an answer without one")
        elif _was_stopped(report, body):
            self.stop(report, _text_of(body))

    def check_error(self, error: openai.APIError) -> None:
        """Passes an error that is no trip, and every error where on_trip is "return".

        Raises:
            TrippedError: the prompt tripped, or the policy answers trips by an error.
        """
        report = guard_in(error.body)
        if report is not None and report.tripped:
            self.stop(report, "", error)

    def miss(self, got: str) -> None:
        """There is no report where one belongs."""
        if self.require_guard:
            raise UnguardedError(got)

    def stop(self, report: GuardReport, text: str, cause: Exception | None = None) -> None:
        """The server has stopped a request."""
        if self.on_trip == "raise":
            raise TrippedError(report, text) from cause


class StreamWatch:
    """Follows one stream to its reports."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._text: dict[int, list[str]] = {}
        """What each choice has said that has not ended."""
        self._reports: dict[int, GuardReport] = {}

    @property
    def report(self) -> GuardReport | None:
        """The report so far: of the first choice that tripped, else of the closest to it."""
        return worst(self._reports.values())

    def see(self, item: object) -> None:
        """Takes the next chunk or event in.

        Raises:
            TrippedError, UnguardedError: as for a whole answer.
        """
        kind = field_of(item, "type")
        if kind == "response.output_text.delta":
            self._say(0, field_of(item, "delta"))
        elif kind in _LAST_EVENTS:
            self._end(0, field_of(item, "response"))
        elif isinstance(kind, str):
            self._pass(0, field_of(item, "delta"), field_of(item, "text"))
        for choice in field_of(item, "choices") or ():
            index = field_of(choice, "index") or 0
            delta = field_of(choice, "delta")
            self._say(index, field_of(choice, "text"))
            self._say(index, field_of(delta, "content"))
            self._pass(index, *(field_of(delta, name) for name in _OTHER_TEXT))
            if field_of(choice, "finish_reason") is not None:
                self._end(index, choice)

    def see_error(self, error: openai.APIError) -> None:
        """Takes the error in that broke the stream off.

        Raises:
            TrippedError: it is a trip, and on_trip is "raise".
        """
        report = guard_in(error.body)
        if report is not None and report.tripped:
            # The error does not say which choice it was.
            self._reports[_NO_CHOICE] = report
            said = "".join(part for parts in self._text.values() for part in parts)
            self._rules.stop(report, said, error)

    def see_end(self) -> None:
        """The stream is over.

        Raises:
            UnguardedError: something of it has no report, and one is required.
        """
        if not self._reports or self._text:
            self._rules.miss("a stream that ended without one")

    def _say(self, index: int, text: Any) -> None:
        self._pass(index, text)
        # Annotations of a choice may follow its end.
        if index not in self._reports:
            self._text.setdefault(index, []).append(text or "")

    def _pass(self, index: int, *said: object) -> None:
        # No report speaks for what comes after it.
        if index in self._reports and any(said):
            self._rules.miss("text after its report")

    def _end(self, index: int, ended: object) -> None:
        text = "".join(self._text.pop(index, ()))
        report = parse_report(field_of(ended, "guard"))
        if report is None:
            self._rules.miss("a stream that ended without one")
            return
        self._reports[index] = report
        if _was_stopped(report, ended):
            self._rules.stop(report, text)


def _was_stopped(report: GuardReport, ended: object) -> bool:
    """A trip in observe mode stops nothing, except where a token had no score."""
    return report.tripped and (
        report.mode == "enforce"
        or field_of(ended, "finish_reason") == "content_filter"
        or field_of(field_of(ended, "incomplete_details"), "reason") == "content_filter"
        or any(_was_stopped(report, choice) for choice in field_of(ended, "choices") or ())
    )


def _text_of(body: object) -> str:
    """What the choice that was stopped says, or the whole response."""
    for choice in field_of(body, "choices") or ():
        report = parse_report(field_of(choice, "guard"))
        if report is not None and report.tripped:
            return (
                field_of(choice, "text") or field_of(field_of(choice, "message"), "content") or ""
            )
    parts = (
        field_of(part, "text") or ""
        for item in field_of(body, "output") or ()
        for part in field_of(item, "content") or ()
    )
    return "".join(parts)
