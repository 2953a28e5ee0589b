"""What is written down, and in what form databases give it back."""

from __future__ import annotations

import math

import pytest

from circuit_breakers.audit.entry import ScoreTrace, new_entry_id

from .entries import trace, trip


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("org/model", "org/model"),
        ("a\x00b\nc", "a?b?c"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("x" * 501, "x" * 500),
    ],
)
def test_text_that_a_database_would_refuse_is_replaced(text: str, kept: str) -> None:
    assert trip(detail=text).normalised().detail == kept


def test_numbers_that_a_database_would_change_are_replaced() -> None:
    entry = trip(score=-0.0, threshold=math.nan).normalised()
    assert math.copysign(1, entry.score or 0.0) == 1
    assert entry.threshold is None


def test_a_trace_survives_its_row() -> None:
    original = trace(tripped="completion", stopped=True)
    assert ScoreTrace.from_row(original.to_row()) == original


def test_ids_differ() -> None:
    assert len({new_entry_id() for _ in range(1000)}) == 1000


def test_an_entry_has_no_field_for_text_of_a_request() -> None:
    assert set(trip().to_json()) == {
        *("entry_id", "kind", "action", "time_us", "key_id", "request_id", "model", "policy"),
        *("breaker", "phase", "probe", "score", "threshold", "token_index", "choice", "detail"),
    }
