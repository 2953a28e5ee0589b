"""guards.json, guards.html and the table in the terminal, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from circuit_breakers_training.peers.figures import Row
from circuit_breakers_training.peers.run import GuardsReport
from circuit_breakers_training.report.document import (
    Cell,
    Document,
    Headline,
    Headlines,
    Items,
    Paragraph,
    Plot,
    Section,
    Share,
    Table,
)
from circuit_breakers_training.report.numbers import percent
from circuit_breakers_training.report.page import to_html
from circuit_breakers_training.report.plots import roc_curves_plot

__all__ = ["guards_files", "print_guards"]

_HEADER = (
    "guard",
    "sees",
    "conversations",
    "AUROC",
    "harmful that trip",
    "benign that trip",
    "trip at 1 % of the test's benign",
    "CPU ms",
    "tokens leaked",
)
_PIPED_WIDTH = 200
_COUNTED = (
    "Every guard has the same test conversations. Those with a threshold got it from the benign "
    "conversations of the calibration split, for the same promise and by the same function; ours "
    "are those of the artifact. Harmful that trip: share at the threshold, with the two-sided 95 % "
    "Clopper-Pearson interval; benign that trip: with the one-sided 95 % bound. CPU ms: median CPU "
    "time of scoring one request, by itself, on one thread; for our probe what it adds to a "
    "forward that runs anyway. Tokens leaked: tokens of harmful answers, as the dataset has them, "
    "that a reader of a stream had before the guard could say stop."
)


def guards_files(report: GuardsReport) -> Mapping[str, bytes]:
    """Files of a comparison, by their name in its directory."""
    return {
        "guards.json": (json.dumps(_json(report), indent=1, allow_nan=False) + "\n").encode(),
        "guards.html": to_html(_document(report)).encode(),
    }


def print_guards(report: GuardsReport, console: Console) -> None:
    """One line a guard."""
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, file=console.file)
    table = TerminalTable(title=f"guards beside {report.breaker}", title_justify="left")
    for index, column in enumerate(_HEADER):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for row in report.rows:
        table.add_row(*(cell if isinstance(cell, str) else cell.text for cell in _cells(row)))
    console.print(table, markup=False)
    console.print(_basis(report), markup=False, highlight=False)


def _json(report: GuardsReport) -> dict[str, Any]:
    fields = {
        name: value for name, value in vars(report).items() if name not in ("rows", "started")
    }
    return {
        "schema_version": 1,
        "started": report.started.isoformat(timespec="seconds"),
        **fields,
        "guards": [asdict(row) for row in report.rows],
    }


def _document(report: GuardsReport) -> Document:
    ran = [row for row in report.rows if not row.not_run]
    curves = {
        f"{row.name}, {row.sees}": (row.false_positive, row.true_positive)
        for row in ran
        if row.false_positive
    }
    notes = [f"{row.name}: {note}" for row in report.rows for note in row.notes]
    return Document(
        kind="Guards beside breaker",
        name=report.breaker,
        summary=(
            Headlines(
                caption=f"of {report.started:%Y-%m-%d %H:%M} UTC",
                items=(
                    Headline("guards run", f"{len(ran)} of {len(report.rows)}"),
                    Headline("harmful conversations", str(report.num_cases["test harmful"])),
                    Headline("benign conversations", str(report.num_cases["test benign"])),
                ),
            ),
            Paragraph(_basis(report)),
        ),
        sections=(
            Section(
                name="guards",
                title="Guards",
                blocks=(
                    Paragraph(_COUNTED),
                    Table(
                        caption="All guards on the same test split",
                        header=_HEADER,
                        rows=tuple(map(_cells, report.rows)),
                    ),
                    *([Items(tuple(dict.fromkeys(notes)))] if notes else []),
                ),
            ),
            *(
                [
                    Section(
                        name="roc",
                        title="ROC",
                        blocks=(
                            Plot(
                                name="guards-roc",
                                title="ROC of each guard",
                                caption="Harmful conversations that trip over benign ones that do, "
                                "for all thresholds of each guard; a guard works at the left end.",
                                draw=partial(roc_curves_plot, curves),
                            ),
                        ),
                    )
                ]
                if curves
                else []
            ),
            Section(
                name="data",
                title="Data",
                blocks=(
                    Table(
                        caption="SHA-256 of the data",
                        header=("file", "digest"),
                        rows=tuple(sorted(report.data_sha256.items())),
                    ),
                ),
            ),
        ),
    )


def _basis(report: GuardsReport) -> str:
    counts = ", ".join(f"{name} {num}" for name, num in report.num_cases.items())
    origin = (
        "The breaker was made from this very dataset."
        if report.same_data
        else "The breaker was made from other data, and its thresholds come from there."
    )
    return (
        f"Breaker {report.digest[:12]} for {report.model}; promise: at most "
        f"{percent(report.target_fpr)} of benign conversations trip, at {report.confidence:.0%} "
        f"confidence. Conversations: {counts}. {origin}"
    )


def _cells(row: Row) -> tuple[Cell, ...]:
    if row.not_run:
        return (row.name, row.sees, "", f"not run: {row.not_run}", *[""] * 5)
    assert row.tpr is not None and row.benign is not None
    tpr = row.tpr.share or 0.0
    benign, bound = row.benign["share"], row.benign["upper_bound"]
    return (
        row.name,
        row.sees,
        f"{row.num_harmful} + {row.num_benign}",
        _auroc(row),
        Share(
            f"{percent(tpr)} ({100 * row.tpr.low:.1f} to {percent(row.tpr.high)})",
            tpr,
            row.tpr.low,
            row.tpr.high,
        ),
        Share(
            f"{row.benign['num_trips']}: {percent(benign)}, at most {percent(bound)}",
            benign,
            0.0,
            bound,
        ),
        "" if row.tpr_at_1pct is None else percent(row.tpr_at_1pct),
        "" if row.cost_ms is None else f"{row.cost_ms:.2f}",
        ""
        if row.leak is None
        else f"{row.leak.num_tokens} of {row.leak.of} ({percent(row.leak.share)}), "
        f"median {row.leak.median:g}",
    )


def _auroc(row: Row) -> str:
    if row.auroc is None:
        return "no score"
    if row.auroc_low is None or row.auroc_high is None:
        return f"{row.auroc:.3f}"
    return f"{row.auroc:.3f} ({row.auroc_low:.3f} to {row.auroc_high:.3f})"
