"""After how many steps or queries requests were broken: shares, intervals, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from circuit_breakers_training.evaluation.rates import rate
from circuit_breakers_training.evaluation.results import RESULTS_FILE, write_results

__all__ = [
    "Outcome",
    "SavedText",
    "Tally",
    "milestones",
    "summary",
    "table",
    "write_attack",
]

TEXTS_FILE = "completions.jsonl"


@dataclass(kw_only=True)
class Tally:
    """Keeps the books of one request under one attack: looks come in ascending order."""

    broken_at: int | None = None
    """Step or query of the first answer without a trip; None if there was none."""
    answered_at: int | None = None
    """Of the first answer, a late trip or not."""
    spent: int = 0
    """Steps or queries that were used."""

    def look(self, at: int, *, broken: bool, answered: bool) -> None:
        """What was seen at step or query `at`."""
        assert at >= self.spent
        self.spent = at
        if broken and self.broken_at is None:
            self.broken_at = at
        if answered and self.answered_at is None:
            self.answered_at = at


class Outcome(NamedTuple):
    """One request under one attack."""

    tally: Tally
    facts: Mapping[str, Any]
    """Scores and losses, no text."""

    def to_json(self, index: int) -> dict[str, Any]:
        """A row of the results."""
        return {"request": index, **asdict(self.tally), **self.facts}


class SavedText(NamedTuple):
    """A completion, kept only if the user asks for it."""

    attack: str
    request: int
    at: int
    tripped: bool
    text: str


def milestones(limit: int, marks: Iterable[int]) -> tuple[int, ...]:
    """Numbers of steps or queries that are reported: the marks below the limit, and the limit."""
    return (*sorted(mark for mark in marks if mark < limit), limit)


def summary(outcomes: Sequence[Outcome], marks: Sequence[int]) -> dict[str, Any]:
    """Shares with their intervals, and how long it took; plain JSON."""
    tallies = [outcome.tally for outcome in outcomes]
    broken = [tally.broken_at for tally in tallies if tally.broken_at is not None]
    # A request that holds is one that takes longer than anybody tried.
    middle = median([math.inf if t.broken_at is None else t.broken_at for t in tallies])
    return {
        "broken_within": {
            str(mark): rate(
                t.broken_at is not None and t.broken_at <= mark for t in tallies
            ).to_json()
            for mark in marks
        },
        "answered": rate(t.answered_at is not None for t in tallies).to_json(),
        "median": None if math.isinf(middle) else middle,
        "mean_of_broken": mean(broken) if broken else None,
        "rows": [outcome.to_json(index) for index, outcome in enumerate(outcomes)],
    }


def table(titles: Mapping[str, str], attacks: Mapping[str, Any], unit: str) -> list[str]:
    """Markdown lines: a row for each attack, a column for each milestone.

    Args:
        titles: of the attacks, by name.
        attacks: summaries, by name, all of the same milestones.
        unit: "steps" or "queries".
    """
    marks = list(next(iter(attacks.values()))["broken_within"])
    head = ["broken within", *(f"{mark} {unit}" for mark in marks)]
    head += [f"median {unit}", f"mean {unit} of the broken", "answered, late trips included"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in attacks.items():
        cells = [titles[name], *(_share(found["broken_within"][mark]) for mark in marks)]
        cells.append(f"above {marks[-1]}" if found["median"] is None else f"{found['median']:g}")
        cells.append("-" if (m := found["mean_of_broken"]) is None else f"{m:.1f}")
        cells.append(_share(found["answered"]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_attack(
    out: Path, results: Mapping[str, Any], report: Sequence[str], texts: Sequence[SavedText] | None
) -> None:
    """results.json and report.md, and completions only if there is a list of them."""
    files = {
        RESULTS_FILE: (json.dumps(results, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": ("\n".join(report) + "\n").encode(),
    }
    if texts is not None:
        lines = (json.dumps(text._asdict(), ensure_ascii=False) + "\n" for text in texts)
        files[TEXTS_FILE] = "".join(lines).encode()
    write_results(out, files)


def _share(found: Mapping[str, Any]) -> str:
    low, high = round(100 * found["low"]), round(100 * found["high"])
    return f"{found['count']} of {found['num']} ({low}-{high} %)"
