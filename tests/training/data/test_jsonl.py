import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import (
    Conversation,
    Message,
    read_conversations,
    write_conversations,
)

USER = {"role": "user", "content": "How are you?"}
ASSISTANT = {"role": "assistant", "content": "Fine."}
GOOD: dict[str, Any] = {"messages": [USER, ASSISTANT], "label": "benign", "source": "mine"}


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def _read_second_line(tmp_path: Path, line: bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    return str(caught.value)


def test_required_fields_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    [row] = read_conversations(path)
    assert row.label == "benign"
    assert row.kind == "completion"
    assert row.category is None
    assert row.prompt == "How are you?"
    assert row.response == "Fine."
    assert row.group == hashlib.sha256(b"How are you?").hexdigest()


def test_a_system_turn_and_several_rounds_are_fine(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = tmp_path / "rows.jsonl"
    messages = [system, USER, ASSISTANT, USER, ASSISTANT]
    path.write_text(json.dumps({**GOOD, "messages": messages}))
    [row] = read_conversations(path)
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        Conversation(
            messages=(Message("user", "Où ?\u2028 \n<tab>\t"), Message("assistant", "“Là” 😀")),
            label="harmful",
            source="s",
            category="c",
            group="g",
            kind="prefilled",
        )
    ]
    path = tmp_path / "rows.jsonl"
    digest = write_conversations(path, rows)
    assert read_conversations(path) == rows
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_blank_lines_keep_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n\n{\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:4: got invalid JSON"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_without("messages"), "got no messages"),
        (_without("label"), "got no label"),
        (_without("source"), "got no source"),
        ({**GOOD, "score": 1, "extra": 2}, "unknown fields extra, score"),
        ({**GOOD, "label": "bad"}, 'label="bad", expected one of harmful, benign'),
        ({**GOOD, "label": ["benign"]}, 'label=["benign"]'),
        ({**GOOD, "kind": "essay"}, 'kind="essay", expected one of completion'),
        ({**GOOD, "source": " "}, 'source=" ", expected text'),
        ({**GOOD, "group": ""}, 'group="", expected text'),
        ({**GOOD, "category": 3}, "category=3, expected text"),
        ({**GOOD, "messages": []}, "messages=[], expected a list"),
        ({**GOOD, "messages": "hello"}, 'messages="hello", expected a list'),
        ({**GOOD, "messages": ["hello"]}, 'messages[0]: got "hello"'),
        ({**GOOD, "messages": [{"role": "user"}, ASSISTANT]}, "messages[0]: got no content"),
        (
            {**GOOD, "messages": [{**USER, "name": "x"}, ASSISTANT]},
            "messages[0]: got unknown fields name",
        ),
        (
            {**GOOD, "messages": [USER, {"role": "tool", "content": "x"}]},
            'messages[1]: got role="tool"',
        ),
        (
            {**GOOD, "messages": [USER, {"role": "assistant", "content": "\n"}]},
            "messages[1]: got content=",
        ),
        (
            {**GOOD, "messages": [USER, {"role": "assistant", "content": "\ud800"}]},
            "lone surrogate",
        ),
        ({**GOOD, "messages": [ASSISTANT, USER]}, "got roles assistant, user"),
        ({**GOOD, "messages": [USER]}, "got roles user"),
        ({**GOOD, "messages": [USER, USER, ASSISTANT]}, "got roles user, user, assistant"),
        (
            {**GOOD, "messages": [{"role": "system", "content": "x"}]},
            "got roles system",
        ),
    ],
)
def test_a_wrong_record_names_its_line(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    error = _read_second_line(tmp_path, json.dumps(record).encode())
    assert "rows.jsonl:2: " in error
    assert message in error
    assert "expected" in error
    assert ";" in error  # the cure follows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [', "got invalid JSON"),
        (json.dumps(GOOD).encode() + b",", "got invalid JSON (Extra data"),
        (b"[1]", "got a JSON list"),
        (b'{"label": "\xff"}', "got byte 0xff at offset 11, expected UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    error = _read_second_line(tmp_path, line)
    assert "rows.jsonl:2: " in error
    assert message in error


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="got an empty file"):
        read_conversations(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        read_conversations(tmp_path / "none.jsonl")
