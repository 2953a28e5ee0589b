"""What the adapter costs benign text, as the artifact's own report recorded it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from circuit_breakers_training.gate.rows import Row
from circuit_breakers_training.gate.target import Target

__all__ = ["capability"]

_FILE: Final = "metrics.json"
_SOURCE: Final = f"recorded in the artifact's {_FILE}"
_KINDS: Final = ("benign: ", "refused: ")
"""Texts that the breaker should leave alone; "refused" ones come after a refused request."""


def capability(target: Target) -> list[Row]:
    """Perplexity of held-out benign answers, base to breaker, by kind and over all kinds."""
    changes = _changes(_recorded(target))
    # The file has no counts of tokens to weigh the kinds by.
    mean = sum(map(math.log1p, changes.values())) / len(changes) if changes else None
    return [
        Row(
            name="perplexity_change",
            what="relative change of the perplexity of benign answers, mean of the kinds",
            count=len(changes),
            value=None if mean is None else math.expm1(mean),
            unit="share",
            bar=target.bars["capability.perplexity_change"],
            source=_SOURCE,
            notes=() if changes else (f"the artifact has no perplexity in {_FILE}",),
        ),
        *(
            Row(
                name=kind,
                what="relative change of the perplexity of benign answers",
                count=1,
                value=change,
                unit="share",
                source=_SOURCE,
            )
            for kind, change in changes.items()
        ),
    ]


def _recorded(target: Target) -> Mapping[str, Any]:
    """By kind of text; empty where the artifact brings no such file."""
    if _FILE not in target.breaker.manifest.files:
        return {}
    metrics = json.loads((target.breaker.path / _FILE).read_bytes())
    recorded = metrics.get("perplexity") if isinstance(metrics, dict) else None
    return recorded if isinstance(recorded, dict) else {}


def _changes(recorded: Mapping[str, Any]) -> dict[str, float]:
    changes = {}
    for kind, values in recorded.items():
        if kind.startswith(_KINDS):
            change = values["merged"] / values["base"] - 1
            if math.isfinite(change):
                changes[kind] = change
    return changes
