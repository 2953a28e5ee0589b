from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.circuit_breakers import (
    CIRCUIT_BREAKERS,
    CIRCUIT_BREAKERS_REFUSALS,
)
from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.records import Record

ROW: dict[str, Any] = {
    "category": "Placeholder harm",
    "prompt": "A placeholder request",
    "output": "PLACEHOLDER ANSWER ",
    "llama3_output": "I can't help with that.",
}


def test_the_output_is_harmful() -> None:
    row = CIRCUIT_BREAKERS.load(Record("f: row 1", ROW))
    assert isinstance(row, Conversation)
    assert (row.prompt, row.response) == ("A placeholder request", "PLACEHOLDER ANSWER")
    assert (row.label, row.kind, row.source) == ("harmful", "completion", "circuit-breakers")
    assert row.category == "Placeholder harm"


def test_the_other_output_is_a_refusal_in_the_same_group() -> None:
    row = CIRCUIT_BREAKERS_REFUSALS.load(Record("f: row 1", ROW))
    harmful = CIRCUIT_BREAKERS.load(Record("f: row 1", ROW))
    assert isinstance(row, Conversation)
    assert isinstance(harmful, Conversation)
    assert (row.label, row.kind, row.source) == ("benign", "refusal", "refusal")
    assert row.response == "I can't help with that."
    assert row.group == harmful.group


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "empty prompt"),
        ({"output": ""}, "empty answer"),
        ({"output": None}, "empty answer"),
    ],
)
def test_a_row_without_text_is_dropped(change: dict[str, Any], reason: str) -> None:
    assert CIRCUIT_BREAKERS.load(Record("f: row 1", ROW | change)) == Dropped(reason)


def test_a_value_that_is_no_text_is_named() -> None:
    with pytest.raises(DataError, match=r"f: row 7: output: got \[1\], expected text"):
        CIRCUIT_BREAKERS.load(Record("f: row 7", ROW | {"output": [1]}))
