"""Chats as in UltraChat 200k (Ding et al., arXiv 2305.14233; HuggingFaceH4/ultrachat_200k).

A row has `messages`, a list of `role` and `content`, besides `prompt` and `prompt_id`. Every
conversation is taken for harmless.
"""

from typing import cast, get_args

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import (
    Dropped,
    Format,
    Loaded,
    message_text,
    open_prompt,
)
from circuit_breakers_training.data.jsonl import Conversation, Message, Role, default_group
from circuit_breakers_training.data.records import Record, shown

__all__ = ["ULTRACHAT", "ULTRACHAT_FIRST"]


def _chat(record: Record) -> Loaded:
    messages = _messages(record)
    return messages if isinstance(messages, Dropped) else _conversation(messages)


def _first_exchange(record: Record) -> Loaded:
    messages = _messages(record)
    if isinstance(messages, Dropped):
        return messages
    return _conversation(messages[: 3 if messages[0].role == "system" else 2])


def _conversation(messages: tuple[Message, ...]) -> Loaded:
    if messages[-1].role == "user":
        return open_prompt(messages, "benign", source="ultrachat")
    return Conversation(
        messages=messages, label="benign", source="ultrachat", group=default_group(messages)
    )


def _messages(record: Record) -> tuple[Message, ...] | Dropped:
    value = record.fields["messages"]
    if not isinstance(value, list):
        raise DataError(
            f"{record.where}: got messages={shown(value)}, expected a list of role and content "
            "objects; name another format, or correct the row"
        )
    messages: list[Message] = []
    for index, item in enumerate(value):
        where = f"{record.where}: messages[{index}]"
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise DataError(
                f"{where}: got {shown(item)}, expected an object with role and content; correct it"
            )
        role, content = item["role"], message_text(item["content"], where)
        if role not in get_args(Role):
            return Dropped("turn of another role")
        if not content:
            # UltraChat writes an empty system turn where there is none.
            if role == "system" and index == 0:
                continue
            return Dropped("empty turn")
        messages.append(Message(cast(Role, role), content))
    turns = [m.role for m in messages if m.role != "system"]
    late_system = any(m.role == "system" for m in messages[1:])
    if late_system or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return Dropped("turns out of order")
    return tuple(messages) if turns else Dropped("no turns")


ULTRACHAT = Format(
    name="ultrachat",
    columns=("messages",),
    # Messages alone may be anything, and their label is not for us to guess.
    signature=("messages", "prompt_id"),
    load=_chat,
)
ULTRACHAT_FIRST = Format(name="ultrachat-first", columns=("messages",), load=_first_exchange)
