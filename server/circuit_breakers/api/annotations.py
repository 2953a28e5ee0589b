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
        """Every chunk of a stream is shown to it, not only those that begin or end something."""
        ...

    def on_body(self, body: dict[str, Any], reports: ReportSource) -> None:
        """Annotates a whole answer."""
        ...

    def on_first_chunk(self, chunk: dict[str, Any], reports: ReportSource) -> None:
        """Annotates the first chunk of a stream, whose prompts have all been judged."""
        ...

    def on_choice(self, choice: dict[str, Any], reports: ReportSource) -> None:
        """Annotates a choice in a chunk: each one it watches, else the one that ends it."""
        ...

    def last_chunks(self, reports: ReportSource) -> list[dict[str, Any]]:
        """Fields of further chunks that come after the last choice has ended."""
        ...
