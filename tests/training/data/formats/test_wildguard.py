from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.formats.wildguard import WILDGUARD
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record

# Columns as in the public release; the texts are placeholders.
ROW: dict[str, Any] = {
    "prompt": "A placeholder request",
    "adversarial": False,
    "response": "PLACEHOLDER ANSWER",
    "prompt_harm_label": "harmful",
    "response_refusal_label": "compliance",
    "response_harm_label": "harmful",
    "subcategory": "placeholder",
}


def _load(**change: Any) -> Any:
    return WILDGUARD.load(Record("f: row 2", ROW | change))


@pytest.mark.parametrize(
    ("change", "label", "kind"),
    [
        ({}, "harmful", "completion"),
        ({"prompt_harm_label": None}, "harmful", "completion"),
        ({"response_harm_label": "unharmful"}, "benign", "refusal"),
        (
            {"response_harm_label": "unharmful", "response_refusal_label": "refusal"},
            "benign",
            "refusal",
        ),
        (
            {"response_harm_label": "unharmful", "prompt_harm_label": "unharmful"},
            "benign",
            "completion",
        ),
    ],
)
def test_the_label_is_that_of_the_answer(change: dict[str, Any], label: str, kind: str) -> None:
    row = _load(**change)
    assert isinstance(row, Conversation)
    assert (row.label, row.kind) == (label, kind)
    assert (row.source, row.category) == ("wildguard", "placeholder")


@pytest.mark.parametrize("flag", [True, "True", "true"])
def test_adversarial_prompts_are_a_source_of_their_own(flag: Any) -> None:
    assert _load(adversarial=flag).source == "wildguard-adversarial"


@pytest.mark.parametrize(("asked", "label"), [("harmful", "harmful"), ("unharmful", "benign")])
def test_a_prompt_without_an_answer_waits_for_one(asked: str, label: str) -> None:
    row = _load(response=None, response_harm_label=None, prompt_harm_label=asked)
    assert isinstance(row, Planned)
    assert (row.label, row.prompt) == (label, ROW["prompt"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "empty prompt"),
        ({"response_harm_label": None}, "no label"),
        ({"response": "", "prompt_harm_label": None}, "no label"),
        ({"response_harm_label": "unharmful", "prompt_harm_label": None}, "no label"),
        (
            {
                "response_harm_label": "unharmful",
                "prompt_harm_label": "unharmful",
                "response_refusal_label": "refusal",
            },
            "refusal of a harmless prompt",
        ),
    ],
)
def test_rows_without_a_use_are_dropped(change: dict[str, Any], reason: str) -> None:
    assert _load(**change) == Dropped(reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_harm_label": "bad"}, 'got response_harm_label="bad", expected one of harmful'),
        ({"prompt_harm_label": 1}, "prompt_harm_label: got 1, expected text"),
        ({"adversarial": "maybe"}, 'got adversarial="maybe", expected true or false'),
        ({"adversarial": 1}, "got adversarial=1, expected true or false"),
    ],
)
def test_unknown_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"f: row 2: {message}"):
        _load(**change)
