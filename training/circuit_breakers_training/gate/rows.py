"""Figures, and the bars that they have to keep.

A row without a figure, or that counts fewer things than its bar asks for, has missed it: silence is
no proof.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.evaluation.rates import rate

__all__ = ["Bar", "Bars", "NotRun", "Row", "Unit", "load_bars", "share_row"]

Unit = Literal["", "share", "points"]

_DEFAULTS: Final = "bars.toml"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Limits of one figure, inclusive."""

    at_least: float | None = None
    at_most: float | None = None
    min_count: int = 1
    """Things that the figure has to count."""

    def holds(self, value: float | None, count: int) -> bool:
        """Whether the figure keeps all limits; no figure and NaN keep none."""
        if value is None or count < self.min_count:
            return False
        low = self.at_least is None or value >= self.at_least
        return math.isfinite(value) and low and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a check."""

    name: str
    what: str
    """What was measured, for people."""
    count: int
    """Things that the figure is of."""
    value: float | str | None
    low: float | None = None
    high: float | None = None
    """Ends of its interval, where one applies."""
    unit: Unit = ""
    bar: Bar | None = None
    expected: str | None = None
    """What a text has to be."""
    source: str
    """Where the figure comes from."""
    notes: tuple[str, ...] = ()
    """What failed, by name; never text of a prompt or an answer."""

    @property
    def passed(self) -> bool | None:
        """Whether the bar is kept; None where there is none."""
        if self.expected is not None:
            return self.value == self.expected
        if self.bar is None:
            return None
        assert not isinstance(self.value, str), "a bar is for numbers"
        return self.bar.holds(self.value, self.count)

    def to_json(self) -> dict[str, Any]:
        """The fields, by name, and whether the bar is kept."""
        return {**asdict(self), "notes": list(self.notes), "passed": self.passed}


class NotRun(NamedTuple):
    """What a check gives instead of rows."""

    reason: str


@dataclass(frozen=True)
class Bars:
    """The bars in force."""

    by_name: Mapping[str, Bar]
    changed: tuple[str, ...]
    """Names of those that are not the default ones."""

    def __getitem__(self, name: str) -> Bar:
        return self.by_name[name]


def share_row(
    name: str, what: str, outcomes: Any, *, source: str, bar: Bar | None = None, **more: Any
) -> Row:
    """The share of true outcomes, with its two-sided 95 % Clopper-Pearson interval."""
    found = rate(outcomes)
    return Row(
        name=name,
        what=what,
        count=found.num,
        value=found.share,
        low=found.low if found.num else None,
        high=found.high if found.num else None,
        unit="share",
        bar=bar,
        source=source,
        **more,
    )


def load_bars(own: Path | None = None) -> Bars:
    """The default bars, with the values of a file of the user's in their place.

    Raises:
        ConfigError: the file cannot be read, or names or holds what no bar has.
    """
    bars = _parse(resources.files(__package__).joinpath(_DEFAULTS).read_text("utf-8"), _DEFAULTS)
    defaults = {name: Bar(**values) for name, values in bars.items()}
    if own is None:
        return Bars(defaults, ())
    try:
        changes = _parse(own.read_text("utf-8"), str(own))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{own}: cannot be read ({e}), expected a TOML file; check --bars") from e
    if unknown := sorted(set(changes) - set(defaults)):
        raise ConfigError(
            f"{own}: got bar {unknown[0]!r}, expected one of {', '.join(defaults)}; correct it"
        )
    changed = {name: replace(defaults[name], **values) for name, values in changes.items()}
    return Bars(
        defaults | changed, tuple(name for name in changed if changed[name] != defaults[name])
    )


def _parse(text: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        groups = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # tomllib's own, and those that it lets through
        raise ConfigError(f"{where}: got invalid TOML ({e}), expected bars; correct it") from e
    found = {}
    for group, members in groups.items():
        for name, values in members.items() if isinstance(members, dict) else [("", members)]:
            full = f"{group}.{name}".rstrip(".")
            if not isinstance(values, dict):
                raise ConfigError(
                    f"{where}: got {full} = {values!r}, expected a table such as "
                    "[detection.auroc] with at_least = 0.97; correct it"
                )
            _check_values(full, values, where)
            found[full] = values
    return found


def _check_values(name: str, values: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in fields(Bar)]
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in known or not is_number or not abs(value) <= sys.float_info.max:
            raise ConfigError(
                f"{where}: got {name}.{key} = {value!r}, expected a number for one of "
                f"{', '.join(known)}; correct it"
            )
        if key == "min_count" and (not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"{where}: got {name}.min_count = {value!r}, expected a whole number from 1; a "
                "figure of nothing proves nothing"
            )
