"""A training benchmark's report: tables for the terminal, JSON with all raw pairs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from circuit_breakers_training.bench.arms import ARMS, PUBLISHED
from circuit_breakers_training.bench.run import BenchReport

__all__ = ["print_report", "report_json"]

_PIPED_WIDTH = 160


def report_json(report: BenchReport) -> str:
    """Everything, times in seconds and sizes in bytes."""
    return json.dumps(asdict(report), indent=1) + "\n"


def print_report(report: BenchReport, console: Console | None = None) -> None:
    """Tables of the report, on standard output unless told otherwise."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, file=console.file)
    machine, rows = report.machine, report.rows
    console.print(
        f"$ {report.command}\n"
        f"{machine['cpu']}, {machine['num_threads']} threads of {machine['num_cores']} cores, "
        f"accelerator: {machine['accelerator'] or 'none'}; Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, "
        f"peft {machine['peft']}, circuit-breakers {machine['circuit-breakers']}\n"
        f"model {report.model}, precision {report.recipe['precision']}, "
        f"{rows.rows_per_kind} + {rows.rows_per_kind} rows a step, "
        f"{rows.tokens_per_step:.0f} tokens, median {rows.median_row_tokens}, longest "
        f"{rows.longest_row_tokens}, {rows.density:.0%} of the places when padded\n"
        f"rows: {rows.source}",
        highlight=False,
        markup=False,
    )
    for table in (_exactness(report), _times(report), _memory(report)):
        if table.row_count:
            console.print(table)


def _exactness(report: BenchReport) -> Table:
    table = _table(
        "One step from the same adapter; differences from the published loop in float32",
        *("arm", "precision", "rows", "loss", "difference"),
        *("gradients", "difference", "worst tensor"),
    )
    for found in report.exactness:
        table.add_row(
            found.arm,
            found.precision,
            f"{found.rows_per_kind} + {found.rows_per_kind}",
            f"{found.losses.loss:.7f}",
            f"{found.loss_difference:.1e}",
            f"{found.num_tensors} tensors",
            f"{found.gradient_difference:.1e}",
            f"{found.worst_tensor_difference:.1e}",
        )
    return table


def _times(report: BenchReport) -> Table:
    table = _table(
        "Seconds a step, medians; ratios of neighbouring steps on the same rows, ours is 1",
        *("arm", "what", "arm s", "ours s", "ratio", "quartiles", "min-max"),
        *("CPU ratio", "quartiles", "pairs"),
    )
    for times in report.times:
        low, q1, median, q3, high = _spread(times.wall_ratios)
        _, cpu_q1, cpu_median, cpu_q3, _ = _spread(times.cpu_ratios)
        table.add_row(
            times.arm,
            ARMS[times.arm].label,
            *(
                f"{statistics.median(t.wall_s for t in side):.3f}"
                for side in zip(*times.pairs, strict=True)
            ),
            f"{median:.3f}",
            f"{q1:.3f}-{q3:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{cpu_median:.3f}",
            f"{cpu_q1:.3f}-{cpu_q3:.3f}",
            str(len(times.pairs)),
        )
    return table


def _memory(report: BenchReport) -> Table:
    table = _table(
        "Peak memory of a fresh process, two steps, MiB",
        *("arm", "loaded", "peak", "of the published loop's peak"),
    )
    published = next((p.peak_bytes for p in report.peaks if p.arm == PUBLISHED), None)
    for peak in report.peaks:
        table.add_row(
            peak.arm,
            f"{peak.loaded_bytes / 2**20:.0f}",
            f"{peak.peak_bytes / 2**20:.0f}",
            f"{peak.peak_bytes / published:.3f}" if published else "",
        )
    return table


def _spread(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Lowest, first quartile, median, third quartile, highest."""
    if len(values) == 1:
        return (values[0],) * 5
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return min(values), q1, median, q3, max(values)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    return table
