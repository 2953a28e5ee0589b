"""What a training run leaves behind as it goes: metrics.jsonl, and a progress bar."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from circuit_breakers.artifact.files import write_atomically

__all__ = ["RunLog", "peak_rss_mib", "read_metrics"]


class RunLog:
    """Writes one JSON object a step and moves the progress bar. Use as a context manager."""

    def __init__(
        self, path: Path, *, steps: int, done: int = 0, console: Console | None = None
    ) -> None:
        """Go on after `done` steps: later entries of a killed run are removed, to come again.

        Args:
            console: where the progress bar goes; none means no progress bar.
        """
        kept = [entry for entry in read_metrics(path) if entry["step"] <= done]
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None,
        )
        self._task = self._progress.add_task("rerouting", total=steps, completed=done, losses="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()

    def step(self, entry: dict[str, Any]) -> None:
        """Record one step: `entry` has at least step, loss, retain_cosine, reroute_cosine."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        losses = (
            f"loss {entry['loss']:.3f}  cosine benign {entry['retain_cosine']:.3f} "
            f"harmful {entry['reroute_cosine']:.3f}"
        )
        self._progress.update(self._task, completed=entry["step"], losses=losses)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole entries of a metrics file, in order; empty if there is no file."""
    if not path.exists():
        return []
    # A kill may cut the last line; every whole one ends with a newline.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
