"""Guard reports and requests for tests of what is written into answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from circuit_breakers.api.annotations import Annotator
from circuit_breakers.api.responses import StreamShape
from circuit_breakers.guard.decision import GuardReport, Mode, Phase

__all__ = ["PASSED", "TRIPPED", "FormatRequest", "Reports", "collect", "report"]


def report(
    *,
    tripped: bool = False,
    score: float | None = -3.0,
    mode: Mode = "enforce",
    phase: Phase = "completion",
    num_unscored: int = 0,
) -> GuardReport:
    return GuardReport(
        breaker="b",
        policy="default",
        mode=mode,
        tripped=tripped,
        phase=phase if tripped else None,
        probe="p",
        score=score,
        threshold=1.0,
        token_index=7,
        num_scored=8,
        num_unscored=num_unscored,
    )


PASSED, TRIPPED = report(), report(tripped=True, score=2.0)


class Reports:
    """What a guard session tells, one report for each choice."""

    def __init__(
        self,
        *reports: GuardReport | None,
        margins: Mapping[Phase, Mapping[str, float]] | None = None,
    ) -> None:
        self._reports = reports
        self._margins = margins

    def report_for(self, index: int) -> GuardReport | None:
        return self._reports[index] if index < len(self._reports) else None

    def finish_reason_for(self, index: int) -> str | None:
        seen = self.report_for(index)
        return None if seen is None else "content_filter" if seen.tripped else "length"

    def margins_for(self, choice: int, phase: Phase) -> dict[str, float] | None:
        if self._margins is None or self.report_for(choice) is None:
            return None
        return dict(self._margins[phase])


class FormatRequest:
    """What a format knows of the request that it answers."""

    def __init__(self, *annotators: Annotator) -> None:
        self.shape = StreamShape(id="x", object="", model="m", num_choices=1)
        self.annotators = annotators
        self.final_usage: dict[str, Any] | None = None


def collect(
    stream: Callable[..., AsyncIterator[str]], events: Sequence[str], reports: Reports
) -> list[str]:
    """The events that a format makes of vLLM's."""

    async def source() -> AsyncIterator[str]:
        for event in events:
            yield event

    async def run() -> list[str]:
        return [event async for event in stream(source(), reports, FormatRequest())]

    return asyncio.run(run())
