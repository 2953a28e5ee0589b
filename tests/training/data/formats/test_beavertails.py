from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.beavertails import BEAVERTAILS
from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.records import Record

# Columns as in the public release; the texts are placeholders.
ROW: dict[str, Any] = {
    "prompt": "A placeholder request",
    "response": "PLACEHOLDER ANSWER",
    "category": {"animal_abuse": False, "privacy_violation": True, "terrorism": True},
    "is_safe": False,
}


def _load(**change: Any) -> Any:
    return BEAVERTAILS.load(Record("f:2", ROW | change))


def test_an_unsafe_answer_is_harmful_under_its_first_harm() -> None:
    row = _load()
    assert isinstance(row, Conversation)
    assert (row.label, row.category, row.source) == ("harmful", "privacy_violation", "beavertails")


def test_a_safe_answer_takes_no_part_in_fit_and_calibration() -> None:
    row = _load(is_safe=True)
    assert isinstance(row, Conversation)
    assert (row.label, row.kind) == ("benign", "refusal")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_safe": None}, "no label"), ({"response": " "}, "empty answer")],
)
def test_rows_without_a_use_are_dropped(change: dict[str, Any], reason: str) -> None:
    assert _load(**change) == Dropped(reason)


@pytest.mark.parametrize("category", [None, "", "privacy_violation", {}])
def test_other_spellings_of_the_category_are_read(category: Any) -> None:
    assert _load(category=category).category == (category or None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": {"a": 1}}, r'got category=\{"a": 1\}, expected a flag for each harm'),
        ({"category": ["a"]}, r'got category=\["a"\], expected a flag'),
        ({"is_safe": "perhaps"}, 'got is_safe="perhaps", expected true or false'),
    ],
)
def test_unknown_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"f:2: {message}"):
        _load(**change)
