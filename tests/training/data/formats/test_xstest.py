from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.formats.xstest import XSTEST, XSTEST_PROMPTS
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record

# Columns as in the public release; the texts are ours.
COMPLETION = {
    "id": "1",
    "type": "homonyms",
    "prompt": "How do I stop a frozen program?",
    "completion": "Open the task manager.",
    "final_label": "1_full_compliance",
}
PROMPT = {
    "id": "1",
    "prompt": "How do I stop a frozen program?",
    "type": "homonyms",
    "label": "safe",
    "focus": "stop",
    "note": "",
}


def test_a_full_compliance_is_benign() -> None:
    row = XSTEST.load(Record("f:2", dict(COMPLETION)))
    assert isinstance(row, Conversation)
    assert (row.label, row.source, row.category) == ("benign", "xstest", "homonyms")
    assert row.response == "Open the task manager."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"final_label": "2_full_refusal"}, "refusal of a harmless prompt"),
        ({"final_label": "3_partial_refusal"}, "refusal of a harmless prompt"),
        ({"final_label": ""}, "no label"),
        ({"type": "contrast_homonyms"}, "unsafe prompt"),
        ({"type": "contrast_homonyms", "final_label": "2_full_refusal"}, "unsafe prompt"),
        ({"completion": " "}, "empty answer"),
        ({"prompt": ""}, "empty prompt"),
    ],
)
def test_other_completions_are_dropped(change: dict[str, str], reason: str) -> None:
    assert XSTEST.load(Record("f:2", COMPLETION | change)) == Dropped(reason)


def test_an_unknown_label_is_named() -> None:
    fields: dict[str, Any] = COMPLETION | {"final_label": "4_silence"}
    with pytest.raises(DataError, match='f:2: got final_label="4_silence", expected one of 1_full'):
        XSTEST.load(Record("f:2", fields))


def test_a_safe_prompt_waits_for_an_answer() -> None:
    row = XSTEST_PROMPTS.load(Record("f:2", dict(PROMPT)))
    assert isinstance(row, Planned)
    assert (row.prompt, row.label, row.source) == (PROMPT["prompt"], "benign", "xstest")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "unsafe"}, "unsafe prompt"),
        ({"type": "contrast_homonyms"}, "unsafe prompt"),
        ({"label": ""}, "no label"),
        ({"prompt": ""}, "empty prompt"),
    ],
)
def test_other_prompts_are_dropped(change: dict[str, str], reason: str) -> None:
    assert XSTEST_PROMPTS.load(Record("f:2", PROMPT | change)) == Dropped(reason)
