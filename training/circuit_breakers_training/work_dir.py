"""The working directory of a pipeline run: finished stages are kept, and never done twice.

A stage is a function of its inputs that returns plain JSON. Its result lies in `<stage>.json` with
a digest of the inputs, and counts only as long as that digest is the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.run_log import peak_rss_mib

__all__ = ["WorkDir", "json_digest", "progress_bar"]

_MARKER = "circuit-breakers-work.json"


class WorkDir:
    """A directory that belongs to one run."""

    def __init__(self, path: Path, *, resume: bool, owner: bool = True) -> None:
        """Opens or creates the directory.

        Args:
            resume: False removes what an earlier run left there.
            owner: False for a process beside the one that keeps the directory: nothing is touched.
        Raises:
            ConfigError: the directory holds something else.
        """
        self.path = path
        self.seconds: dict[str, float] = {}
        """Time that each stage took when it was really done."""
        self.peak_rss_mib: dict[str, float] = {}
        """Largest memory of the process from its start to the end of each stage."""
        if not owner:
            return
        if path.exists() and any(path.iterdir()):
            if not (path / _MARKER).is_file():
                raise ConfigError(
                    f"got working directory {str(path)!r} with other files in it, expected an "
                    "empty one or that of an earlier run; choose another directory"
                )
            if not resume:
                shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / _MARKER, b"{}\n")

    def stage(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Result of `compute()`, or of an earlier run with the same inputs."""
        digest = json_digest(inputs)
        file = self.path / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_bytes())
            if kept["inputs"] == digest:
                self.seconds[name] = kept["seconds"]
                if "peak_rss_mib" in kept:
                    self.peak_rss_mib[name] = kept["peak_rss_mib"]
                result: dict[str, Any] = kept["result"]
                return result
        started = time.perf_counter()
        # Through JSON, so that a first and a resumed run see the very same values.
        result = json.loads(json.dumps(compute(), allow_nan=False))
        self.seconds[name] = time.perf_counter() - started
        self.peak_rss_mib[name] = peak_rss_mib()
        kept = {
            "inputs": digest,
            "seconds": self.seconds[name],
            "peak_rss_mib": self.peak_rss_mib[name],
            "result": result,
        }
        write_atomically(file, json.dumps(kept).encode())
        return result


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def progress_bar(
    console: Console | None, title: str, total: int
) -> Iterator[Callable[[int], None]]:
    """A function that moves a bar by the number it is given; without a console, nothing shows."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
