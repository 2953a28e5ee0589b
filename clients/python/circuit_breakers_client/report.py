"""The guard report: what the breaker saw of one answer, and where to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

__all__ = [
    "GuardReport",
    "Mode",
    "Phase",
    "TokenScore",
    "field_of",
    "parse_report",
    "parse_token_scores",
    "worst",
]

Mode = Literal["observe", "enforce"]
"""observe reports and never stops; enforce stops the request."""

Phase = Literal["prompt", "completion"]


@dataclass(frozen=True, kw_only=True)
class GuardReport:
    """What the breaker saw of one answer."""

    breaker: str
    policy: str
    mode: Mode
    tripped: bool
    """In observe mode too, where nothing was stopped."""
    phase: Phase | None
    """Where it tripped; None without a trip."""
    probe: str | None
    """The probe that tripped, else the one closest to its threshold; None before any score."""
    score: float | None
    """A logit: at the trip, else the highest; None when unknown."""
    threshold: float | None
    token_index: int | None
    """0-based position in prompt + completion of the token that `score` belongs to."""


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """What the breaker saw of one token of a choice."""

    index: int
    """0-based position in prompt + completion."""
    phase: Phase
    token: str | None
    """Its text; None where it is withheld, as for the token that trips."""
    score: float | None
    """A logit, of the probe that is closest to its threshold; None where no score is judged."""
    probe: str | None
    threshold: float | None


def parse_report(value: object) -> GuardReport | None:
    """The `guard` object of an answer; None for anything that is not one.

    Fields that it does not know are left out, so that a newer server can say more.
    """
    if not isinstance(value, Mapping):
        return None
    fields = {name: value.get(name) for name in GuardReport.__dataclass_fields__}
    if not all(_FITS[name](field) for name, field in fields.items()):
        return None
    return GuardReport(**cast(dict[str, Any], fields))


def parse_token_scores(value: object) -> tuple[TokenScore, ...] | None:
    """The `token_scores` of a choice or an error; None for anything that is not that."""
    if not isinstance(value, list):
        return None
    found = []
    for item in value:
        fields = {name: field_of(item, name) for name in TokenScore.__dataclass_fields__}
        if fields["phase"] is None or not all(_FITS[name](v) for name, v in fields.items()):
            return None
        found.append(TokenScore(**fields))
    return tuple(found)


def worst(reports: Iterable[GuardReport]) -> GuardReport | None:
    """The report that stands for several choices: the first trip, else the closest to one."""
    closest, closest_margin = None, float("-inf")
    for report in reports:
        if report.tripped:
            return report
        margin = float("-inf")
        if report.score is not None and report.threshold is not None:
            margin = report.score - report.threshold
        if closest is None or margin > closest_margin:
            closest, closest_margin = report, margin
    return closest


def field_of(value: object, name: str) -> Any:
    """A field of plain JSON or of one of openai's models; None where there is none."""
    if isinstance(value, Mapping):
        return value.get(name)
    return getattr(value, name, None)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_FITS: dict[str, Callable[[object], bool]] = {
    "breaker": _is_text,
    "policy": _is_text,
    "mode": lambda v: v in ("observe", "enforce"),
    "tripped": lambda v: isinstance(v, bool),
    "phase": lambda v: v in (None, "prompt", "completion"),
    "probe": lambda v: v is None or _is_text(v),
    "score": lambda v: v is None or _is_number(v),
    "threshold": lambda v: v is None or _is_number(v),
    "index": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "token": lambda v: v is None or _is_text(v),
    "token_index": lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool)),
}
