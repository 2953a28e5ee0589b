from typing import Any

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.chat import ULTRACHAT, ULTRACHAT_FIRST
from circuit_breakers_training.data.formats.format import Dropped
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How are you?"}
ASSISTANT = {"role": "assistant", "content": "Fine."}


def _record(*messages: Any) -> Record:
    return Record("f:3", {"prompt": "How are you?", "prompt_id": "1", "messages": list(messages)})


def test_a_chat_is_benign_with_all_its_turns() -> None:
    row = ULTRACHAT.load(_record(SYSTEM, USER, ASSISTANT, USER, ASSISTANT))
    assert isinstance(row, Conversation)
    assert (row.label, row.source, row.kind) == ("benign", "ultrachat", "completion")
    assert [m.role for m in row.messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("start", [(), (SYSTEM,)])
def test_only_the_first_exchange_is_taken_if_asked_for(start: tuple[Any, ...]) -> None:
    row = ULTRACHAT_FIRST.load(_record(*start, USER, ASSISTANT, USER, ASSISTANT))
    assert isinstance(row, Conversation)
    assert len(row.messages) == len(start) + 2


def test_an_empty_system_turn_is_none() -> None:
    row = ULTRACHAT.load(_record({"role": "system", "content": ""}, USER, ASSISTANT))
    assert isinstance(row, Conversation)
    assert [m.role for m in row.messages] == ["user", "assistant"]


def test_a_last_user_turn_waits_for_an_answer() -> None:
    row = ULTRACHAT.load(_record(USER, ASSISTANT, USER))
    assert isinstance(row, Planned)
    assert [m.role for m in row.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((), "no turns"),
        ((SYSTEM,), "no turns"),
        ((ASSISTANT, USER), "turns out of order"),
        ((USER, USER, ASSISTANT), "turns out of order"),
        ((USER, SYSTEM, ASSISTANT), "turns out of order"),
        ((USER, {"role": "tool", "content": "x"}), "turn of another role"),
        ((USER, {"role": ["user"], "content": "x"}), "turn of another role"),
        ((USER, {"role": "assistant", "content": "\n"}), "empty turn"),
    ],
)
def test_chats_that_cannot_be_used_are_dropped(messages: tuple[Any, ...], reason: str) -> None:
    assert ULTRACHAT.load(_record(*messages)) == Dropped(reason)
    assert isinstance(ULTRACHAT_FIRST.load(_record(*messages)), Dropped | Conversation)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", 'f:3: got messages="hello", expected a list'),
        (["hello"], r'f:3: messages\[0\]: got "hello", expected an object'),
        ([{"role": "user"}], r"f:3: messages\[0\]: got .* expected an object"),
        ([{"role": "user", "content": None}], r"f:3: messages\[0\]: got null, expected text"),
        ([{"role": "user", "content": "\ud800"}], r"f:3: messages\[0\]: got a lone surrogate"),
    ],
)
def test_messages_of_a_wrong_type_are_named(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ULTRACHAT.load(Record("f:3", {"messages": messages}))
