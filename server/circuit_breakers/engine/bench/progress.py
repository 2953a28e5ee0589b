"""Progress of a benchmark in the terminal: a bar, and a line for each finished comparison."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from circuit_breakers.engine.bench.ratios import Row

__all__ = ["BenchProgress"]


class BenchProgress:
    """Counts pairs of blocks."""

    def __init__(self, console: Console | None = None) -> None:
        """
        Args:
            console: None shows nothing.
        """
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console or Console(quiet=True),
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> BenchProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def expect(self, num_pairs: int) -> None:
        """How many pairs there will be."""
        self._progress.update(self._task, total=num_pairs)

    def show(self, what: str) -> None:
        """What runs now."""
        self._progress.update(self._task, description=what)

    def advance(self, what: str, num_pairs: int = 1) -> None:
        """Pairs that are done."""
        self._progress.update(self._task, description=what, advance=num_pairs)

    def row(self, row: Row) -> None:
        """A comparison that is done."""
        found = "not available" if row.ratio is None else f"ratio {row.ratio.median:.4f}"
        self._progress.console.print(
            f"{row.arm} / {row.baseline}, {row.workload.name}, batch {row.batch}: {found}",
            highlight=False,
        )
