"""gate.json, gate.html and the table in the terminal, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table as TerminalTable

from circuit_breakers_training.gate.rows import Bar, Row
from circuit_breakers_training.gate.run import Outcome, Result
from circuit_breakers_training.report.document import (
    Cell,
    Document,
    Headline,
    Headlines,
    Items,
    Paragraph,
    Section,
    Share,
    Table,
)
from circuit_breakers_training.report.numbers import percent
from circuit_breakers_training.report.page import to_html

__all__ = ["gate_files", "print_table"]

_HEADER = ("figure", "what", "value", "of", "bar", "kept", "from")


def gate_files(result: Result) -> Mapping[str, bytes]:
    """Files of a gate, by their name in its directory."""
    return {
        "gate.json": (json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode(),
        "gate.html": to_html(_document(result)).encode(),
    }


def print_table(result: Result, console: Console) -> None:
    """What has a bar, check by check, and the verdict."""
    table = TerminalTable("check", "figure", "value", "of", "bar", "kept", title=_title(result))
    for outcome in result.outcomes:
        judged = [row for row in outcome.rows if row.passed is not None]
        if not judged:
            table.add_row(outcome.name, outcome.reason, "", "", "", _status(result, outcome))
        for i, row in enumerate(judged):
            table.add_row(
                "" if i else outcome.name,
                row.name,
                _text(row),
                str(row.count),
                _bar_text(row),
                _kept(row),
            )
    console.print(table, markup=False)
    console.print(_verdict(result), markup=False, highlight=False)


def _title(result: Result) -> str:
    return f"release gate of {result.target.breaker.manifest.name}"


def _verdict(result: Result) -> str:
    if result.passed:
        return "passed: every bar is kept"
    if not result.missed:
        return "NOT passed: every check was skipped"
    return f"NOT passed: {', '.join(result.missed)}"


def _document(result: Result) -> Document:
    target = result.target
    ran = [outcome for outcome in result.outcomes if outcome.status != "not run"]
    bars = [row for outcome in ran for row in outcome.rows if row.passed is not None]
    changed = target.bars.changed
    return Document(
        kind="Release gate of breaker",
        name=target.breaker.manifest.name,
        summary=(
            Headlines(
                caption=f"of {result.started:%Y-%m-%d %H:%M} UTC",
                items=(
                    Headline("verdict", "passed" if result.passed else "NOT passed"),
                    Headline("bars kept", f"{sum(bool(r.passed) for r in bars)} of {len(bars)}"),
                    Headline("checks run", f"{len(ran)} of {len(result.outcomes)}"),
                ),
            ),
            Paragraph(
                f"Breaker {target.breaker.digest} for {target.breaker.manifest.base_model.id}, on "
                f"the server {target.server.place}, policy {target.served.get('policy')}, mode "
                f"{target.served.get('mode')}. Figures are of the test split with the digests "
                "below, which the breaker was not made from if the check identity says so."
            ),
            Paragraph(
                f"Bars that are not the default ones: {', '.join(changed)}."
                if changed
                else "All bars are the default ones."
            ),
            Table(
                caption="Checks",
                header=("check", "status", "why", "seconds"),
                rows=tuple(
                    (o.name, _status(result, o), _why(o), f"{o.seconds:.1f}")
                    for o in result.outcomes
                ),
            ),
        ),
        sections=(
            *(
                Section(name=f"check-{o.name}", title=o.name, blocks=_blocks(o))
                for o in result.outcomes
                if o.rows
            ),
            Section(
                name="data",
                title="data",
                blocks=(
                    Table(
                        caption="SHA-256 of the data",
                        header=("file", "digest"),
                        rows=tuple(sorted(target.dataset.digests.items())),
                    ),
                ),
            ),
        ),
    )


def _status(result: Result, outcome: Outcome) -> str:
    return f"{outcome.status} (missed)" if outcome.name in result.missed else outcome.status


def _why(outcome: Outcome) -> str:
    missed = [row.name for row in outcome.rows if row.passed is False]
    return outcome.reason or (f"missed: {', '.join(missed)}" if missed else "")


def _blocks(outcome: Outcome) -> tuple[Table | Items, ...]:
    judged = [row for row in outcome.rows if row.passed is not None]
    others = [row for row in outcome.rows if row.passed is None]
    notes = [f"{row.name}: {note}" for row in outcome.rows for note in row.notes]
    return (
        Table(caption="With a bar", header=_HEADER, rows=tuple(map(_cells, judged))),
        *([Items(tuple(notes))] if notes else []),
        *(
            [
                Table(
                    caption="Without a bar",
                    header=_HEADER,
                    rows=tuple(map(_cells, others)),
                    folded=True,
                )
            ]
            if others
            else []
        ),
    )


def _cells(row: Row) -> tuple[Cell, ...]:
    value: Cell = _text(row)
    if row.unit == "share" and isinstance(row.value, float) and row.low is not None:
        assert row.high is not None
        value = Share(_text(row), row.value, row.low, row.high)
    return (row.name, row.what, value, str(row.count), _bar_text(row), _kept(row), row.source)


def _kept(row: Row) -> str:
    return {True: "yes", False: "NO", None: ""}[row.passed]


def _text(row: Row) -> str:
    if row.value is None:
        return "nothing"
    if isinstance(row.value, str):
        return row.value
    interval = ""
    if row.low is not None and row.high is not None:
        low, high = (_number(end, row) for end in (row.low, row.high))
        interval = f" ({low} to {high})"
    return _number(row.value, row) + interval


def _number(value: float, row: Row) -> str:
    if row.unit == "share":
        return percent(value)
    if row.unit == "points":
        return f"{100 * value:+.1f} points"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _bar_text(row: Row) -> str:
    if row.expected is not None:
        return row.expected
    bar: Bar | None = row.bar
    if bar is None:
        return ""
    parts = [
        f"{words} {_number(limit, row)}"
        for words, limit in (("at least", bar.at_least), ("at most", bar.at_most))
        if limit is not None
    ]
    return ", ".join([*parts, *([f"of {bar.min_count} or more"] if bar.min_count > 1 else [])])
