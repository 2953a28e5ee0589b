"""What the report does not show: said where it is, so that nobody reads more into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from circuit_breakers_training.report.document import Items, Section
from circuit_breakers_training.report.trips import measured

__all__ = ["limits_section"]

_FEW = 10
"""Conversations below which a rate is hardly known."""


def limits_section(m: Mapping[str, Any]) -> Section:
    """Limits of the figures, and what was not measured at all."""
    return Section(
        name="limits", title="What this report does not show", blocks=(Items(tuple(_limits(m))),)
    )


def _limits(m: Mapping[str, Any]) -> Iterator[str]:
    test, calibration = m["test"], m["probe"]["calibration"]
    if not measured(m, "suites"):
        yield (
            "Prompts of public attack suites, and texts by people and by other models: the test "
            "split comes from where the training data came from."
        )
    yield (
        "An attacker who knows the breaker and searches for inputs that pass it, by rewriting, by "
        "gradients or by embeddings."
    )
    if not measured(m, "long_context"):
        yield (
            f"Conversations of more than {calibration['max_tokens']} tokens: the promise about "
            "benign ones ends there, and no longer harmful one was tried."
        )
    groups = [
        rate["num"]
        for key in ("benign_by_source", "harmful_by_source", "harmful_by_category")
        for rate in (test.get(key) or {}).values()
    ]
    few = sum(num < _FEW for num in groups)
    if few:
        yield (
            f"Rates of small groups: {few} of the {len(groups)} sources and categories have fewer "
            f"than {_FEW} test conversations, and wide intervals."
        )
    yield (
        "How much another seed or another draw of the data would change: this is one run. The "
        "intervals hold for the test conversations alone."
    )
    yield (
        "Intervals of the figures per token: tokens of one conversation go together, so their "
        "number says little."
    )
    yield (
        "What the adapter does to skills: perplexity and a few continuations are no benchmark of "
        "knowledge, reasoning or following instructions."
    )
    yield (
        "The serving path: scores were computed by transformers on whole conversations, not by a "
        "server under load, with sampling, tools or other adapters."
    )
