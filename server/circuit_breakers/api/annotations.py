"""What a client may ask to have written into an answer, besides the guard's own report."""

from __future__ import annotations

from typing import Any, Protocol

from circuit_breakers.guard.decision import GuardReport, Phase

__all__ = ["Annotator", "ReportSource"]


class ReportSource(Protocol):
    """What is needed of a guard session."""

    def report_for(self, index: int) -> GuardReport | None: ...

    def finish_reason_for(self, index: int) -> str | None: ...

    def margins_for(self, choice: int, phase: Phase) -> dict[str, float] | None: ...


class Annotator(Protocol):
    """One kind of annotation, for one request."""

    @property
    def watches(self) -> bool:
        """Every chunk of a stream is shown to it, whatever is in it."""
        ...

    def on_body(self, body: dict[str, Any], reports: ReportSource) -> None:
        """Annotates a whole answer."""
        ...

    def on_chunk(self, chunk: dict[str, Any], reports: ReportSource, *, is_first: bool) -> None:
        """Annotates a chunk of a stream: each one it watches, else the first one and those that end
        a choice.

        Args:
            is_first: the stream's prompts have all been judged, and nothing was sent.
        """
        ...

    def last_chunks(self, reports: ReportSource) -> list[dict[str, Any]]:
        """Fields of further chunks that come after the last choice has ended."""
        ...
