"""Limits of a key are whole numbers from one, or left to the server."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from circuit_breakers.policies.limits import KeyLimits


def test_limits_are_frozen_and_all_optional() -> None:
    limits = KeyLimits()
    assert (limits.max_concurrent, limits.requests_per_minute, limits.burst) == (None,) * 3
    with pytest.raises(ValidationError):
        limits.burst = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"max_concurrent": 0},
        {"max_concurrent": True},
        {"requests_per_minute": 1.5},
        {"requests_per_minute": "60"},
        {"burst": 2},
        {"rate": 1},
    ],
)
def test_what_cannot_take_effect_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KeyLimits.model_validate(values)
