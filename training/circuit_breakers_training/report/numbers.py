"""Measured numbers in words, and the intervals around them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from scipy.stats import beta, norm

from circuit_breakers_training.report.document import Share

__all__ = [
    "Interval",
    "aggregation_text",
    "auroc_interval",
    "bounded_share",
    "count_text",
    "flat_fields",
    "is_rate",
    "layers_text",
    "percent",
    "rate_interval",
    "share_cell",
]

_CONFIDENCE = 0.95


class Interval(NamedTuple):
    low: float
    high: float


def rate_interval(num_trips: int, num: int) -> Interval:
    """Two-sided 95 % Clopper-Pearson interval of a rate (Clopper and Pearson 1934)."""
    assert 0 <= num_trips <= num and num > 0
    tail = (1 - _CONFIDENCE) / 2
    low = 0.0 if num_trips == 0 else float(beta.ppf(tail, num_trips, num - num_trips + 1))
    high = 1.0 if num_trips == num else float(beta.ppf(1 - tail, num_trips + 1, num - num_trips))
    return Interval(low, high)


def auroc_interval(auroc: float, num_harmful: int, num_benign: int) -> Interval | None:
    """Two-sided 95 % interval of an AUROC, by its standard error on the logit scale.

    The standard error is that of Hanley and McNeil (1982), equations 1 and 2. None where it is
    zero or undefined: at 0 and 1.
    """
    if not 0 < auroc < 1 or num_harmful < 1 or num_benign < 1:
        return None
    q1 = auroc / (2 - auroc)
    q2 = 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc)
        + (num_harmful - 1) * (q1 - auroc**2)
        + (num_benign - 1) * (q2 - auroc**2)
    ) / (num_harmful * num_benign)
    # The plain interval runs over 1 where AUROCs of use are.
    center = math.log(auroc / (1 - auroc))
    reach = norm.ppf((1 + _CONFIDENCE) / 2) * math.sqrt(variance) / (auroc * (1 - auroc))
    return Interval(*(1 / (1 + math.exp(-(center + side * reach))) for side in (-1, 1)))


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1, in per cent."""
    return f"{100 * share:.{digits}f} %"


def count_text(rate: Mapping[str, Any]) -> str:
    """How many of how many trip."""
    return f"{rate['num_trips']} of {rate['num']}" if rate["num"] else "none tested"


def share_cell(rate: Mapping[str, Any]) -> Share:
    """The share that trips with its two-sided 95 % interval."""
    if not rate["num"]:
        return Share("", 0.0, 0.0, 0.0)
    low, high = rate_interval(rate["num_trips"], rate["num"])
    share = rate["num_trips"] / rate["num"]
    return Share(f"{percent(share)} ({100 * low:.1f} to {percent(high)})", share, low, high)


def bounded_share(rate: Mapping[str, Any]) -> Share:
    """The share that trips with its one-sided 95 % upper bound, as a calibration promises it."""
    if not rate["num"]:
        return Share("", 0.0, 0.0, 0.0)
    share, bound = rate["num_trips"] / rate["num"], rate["upper_bound"]
    return Share(f"{percent(share)}, at most {percent(bound)}", share, 0.0, bound)


def aggregation_text(spec: Mapping[str, Any]) -> str:
    """How token logits become a running score."""
    if spec["kind"] == "ema":
        return f"EMA, weight {spec['alpha']:g}"
    if spec["kind"] == "rolling_mean":
        return f"mean of {spec['window']}"
    return "maximum"


def layers_text(spec: Mapping[str, Any]) -> str:
    """The blocks that a probe reads: `layer` for one, `layers` for several."""
    several = spec.get("layers")
    return " + ".join(map(str, several)) if several else str(spec["layer"])


def is_rate(value: Any) -> bool:
    """Counts of tested conversations and of those that trip."""
    return isinstance(value, Mapping) and {"num", "num_trips"} <= value.keys()


def flat_fields(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested fields, as text."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
