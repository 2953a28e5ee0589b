"""Sections about where trips happen. All of it is optional, and read tolerantly.

    tokens_to_trip      response tokens up to the trip of each harmful conversation that trips: a
                        list of numbers, or {"edges": [...], "counts": [...]}, drawn; either may lie
                        in a mapping, by label
    tokens_until_trip   figures that sum these up, and `tokens`, such a list
    by_length           rates by length of the conversation, in mappings of any depth, or a list of
                        mappings with a name
    long_context        the same for conversations longer than the calibrated ones
    suites              the same for sets of prompts from elsewhere

A rate is a mapping with num and num_trips. Whatever else such a mapping holds is shown by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from circuit_breakers_training.report.document import Block, Cell, Plot, Section, Table
from circuit_breakers_training.report.numbers import (
    count_text,
    flat_fields,
    is_rate,
    share_cell,
)
from circuit_breakers_training.report.plots import trip_position_plot

__all__ = ["measured", "trip_sections"]

_MAX_BINS = 24
_WORDS = {
    "num": "harmful conversations",
    "num_trips": "that trip",
    "median": "tokens, median of those that trip",
    "p90": "tokens, nine of ten of those that trip",
    "share_within_16": "share that trips within 16 tokens",
    "benign_run": "benign turns, before the harmful one",
    "harmful_turn": "harmful turn, after benign ones that did not trip",
    "harmful_alone": "the same harmful turn by itself",
    "num_benign_tokens.min": "benign tokens before the harmful turn, fewest",
    "num_benign_tokens.max": "benign tokens before the harmful turn, most",
    "num_benign_tokens.sum": "benign tokens in all",
}
"""What is written for names of recorded values."""


def measured(m: Mapping[str, Any], key: str) -> Any:
    """An optional value, at the top level or with the other figures of the test split."""
    return m.get(key) or m["test"].get(key)


def trip_sections(m: Mapping[str, Any]) -> Iterator[Section]:
    """One section for each kind of value that was measured."""
    blocks = tuple(_positions(m))
    if blocks:
        yield Section(name="position", title="Where it trips", blocks=blocks, page_only=True)
    for key, title, what in (
        ("by_length", "Trips by length", "length"),
        ("long_context", "Long conversations", "conversations"),
        ("suites", "Other sets of prompts", "set"),
    ):
        blocks = tuple(_tables(measured(m, key) or {}, title, what))
        if blocks:
            yield Section(name=key.replace("_", "-"), title=title, blocks=blocks)


def _positions(m: Mapping[str, Any]) -> Iterator[Block]:
    summary = dict(measured(m, "tokens_until_trip") or {})
    listed = summary.pop("tokens", None)
    rows = tuple((_WORDS.get(name, name), text) for name, text in flat_fields(_rounded(summary)))
    if rows:
        caption = "Generated tokens up to the trip of a harmful conversation, prompt scored too"
        yield Table(caption=caption, header=("", "value"), rows=rows)
    positions = measured(m, "tokens_to_trip") or listed
    if positions:
        yield from _position_plots(positions)


def _position_plots(positions: Any) -> Iterator[Plot]:
    if isinstance(positions, Mapping) and not {"edges", "counts"} <= positions.keys():
        named = [(str(label), value) for label, value in positions.items()]
    else:
        named = [("harmful", positions)]
    for number, (label, value) in enumerate(named):
        histogram = _histogram(value)
        if histogram is None:
            continue
        edges, counts = histogram
        yield Plot(
            name=f"position-{number}",
            title=f"Response tokens up to the trip, {label}",
            caption=_said(value, counts),
            draw=partial(trip_position_plot, edges, counts),
            page_only=True,
        )


def _histogram(value: Any) -> tuple[list[float], list[int]] | None:
    """Edges and counts of a histogram, or of a list of positions; None for anything else."""
    if isinstance(value, Mapping):
        edges, counts = value.get("edges"), value.get("counts")
        if edges and counts and len(edges) == len(counts) + 1:
            return list(edges), list(counts)
        return None
    numbers = _numbers(value)
    if not numbers:
        return None
    # All bins hold as many token numbers; else their heights could not be compared.
    width = math.ceil((max(numbers) + 1) / _MAX_BINS)
    edges = np.arange(0, max(numbers) + 1 + width, width)
    counts, _ = np.histogram(numbers, edges)
    return edges.tolist(), counts.tolist()


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [x for x in value if isinstance(x, int | float)]


def _said(value: Any, counts: Sequence[int]) -> str:
    text = f"{sum(counts)} conversations trip in the response"
    numbers = _numbers(value)
    if numbers:
        half, most = np.quantile(numbers, [0.5, 0.9])
        text += f"; half of them within {half:.0f} tokens, 90 % within {most:.0f}"
    return f"{text}."


def _tables(values: Any, title: str, what: str) -> Iterator[Block]:
    if isinstance(values, Sequence) and all(isinstance(value, Mapping) for value in values):
        values = {str(value.get("name", number)): value for number, value in enumerate(values)}
    if not isinstance(values, Mapping):
        return
    rates = list(_rates(values))
    if rates:
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (_WORDS.get(name, name), count_text(rate), share_cell(rate)) for name, rate in rates
        )
        header = (what, "trip", "share (95 % interval)")
        yield Table(caption=f"{title}: trips at the threshold", header=header, rows=rows)
    others = flat_fields(_rounded(_without_rates(values)))
    rest = tuple((_WORDS.get(name, name), text) for name, text in others)
    if rest:
        yield Table(caption=f"{title}: other values", header=("", "value"), rows=rest)


def _rates(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in values.items():
        if is_rate(value):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _rates(value, f"{prefix}{name}, ")


def _without_rates(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_rates(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if not is_rate(value)
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Measured figures with the digits that they deserve."""
    return {
        name: _rounded(value)
        if isinstance(value, Mapping)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }
