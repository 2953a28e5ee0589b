"""What this client raises besides openai's own errors.

openai.OpenAIError
    TrippedError     the breaker stopped the request, and on_trip is "raise"
    UnguardedError   an answer, or a server, without a guard
"""

from __future__ import annotations

import openai

from circuit_breakers_client.report import GuardReport, Phase

__all__ = ["TrippedError", "UnguardedError"]


class TrippedError(openai.OpenAIError):
    """The breaker stopped a request."""

    report: GuardReport
    partial_text: str
    """What came before the trip, or the refusal in its place; empty when nothing did."""

    def __init__(self, report: GuardReport, partial_text: str = "") -> None:
        super().__init__(report, partial_text)
        self.report = report
        self.partial_text = partial_text

    def __str__(self) -> str:
        report = self.report
        return (
            f"the {report.phase} was stopped by breaker {report.breaker!r} at token "
            f"{report.token_index}: score {report.score} of probe {report.probe!r}, threshold "
            f"{report.threshold}, policy {report.policy!r}"
        )

    @property
    def phase(self) -> Phase | None:
        """Whether the prompt or the completion tripped."""
        return self.report.phase

    @property
    def score(self) -> float | None:
        return self.report.score

    @property
    def threshold(self) -> float | None:
        return self.report.threshold

    @property
    def probe(self) -> str | None:
        return self.report.probe

    @property
    def token_index(self) -> int | None:
        return self.report.token_index

    @property
    def policy(self) -> str:
        return self.report.policy


class UnguardedError(openai.OpenAIError):
    """There is no guard report where one is required; the answer is withheld."""

    def __init__(self, got: str) -> None:
        super().__init__(got)

    def __str__(self) -> str:
        return (
            f"got {self.args[0]}, expected a guard report; check base_url and that the server "
            "runs a circuit breaker (GET /v1/breaker), or pass require_guard=False"
        )
