"""Conversations as JSON Lines: one labelled conversation a line, checked field by field.

The format is described for users in README.md beside this file.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.records import json_lines, shown

__all__ = [
    "Conversation",
    "Kind",
    "Label",
    "Message",
    "Role",
    "default_group",
    "parse_conversation",
    "read_conversations",
    "write_conversations",
]

Role = Literal["system", "user", "assistant"]
Label = Literal["harmful", "benign"]
Kind = Literal["completion", "prefilled", "refusal"]

_REQUIRED = ("messages", "label", "source")
_OPTIONAL = ("category", "group", "kind")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation that ends with the assistant's turn, and whether that turn is harmful."""

    messages: tuple[Message, ...]
    """Optional system turn, then user and assistant in turns; the last one is the assistant's."""
    label: Label
    """Says what the LAST turn is: a refusal of a harmful request is benign."""
    source: str
    """Where the prompt comes from; reports are split by it."""
    category: str | None = None
    """Kind of harm, or of harmless topic."""
    group: str
    """Rows of one group always land in the same split."""
    kind: Kind = "completion"
    """completion: free; prefilled: the first words were given; refusal: written, not sampled."""

    @property
    def prompt(self) -> str:
        """The user turn that the last assistant turn answers."""
        return self.messages[-2].content

    @property
    def response(self) -> str:
        """The last assistant turn, which `label` is about."""
        return self.messages[-1].content


def default_group(messages: Iterable[Message]) -> str:
    """Group of a row that names none: sha256 of its first user turn."""
    first_user = next(m.content for m in messages if m.role == "user")
    return hashlib.sha256(first_user.encode()).hexdigest()


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSONL file, in file order.

    Raises:
        DataError: the file is missing or empty, or a line is wrong; the message names file and
            line, what was got and expected, and the cure.
    """
    rows = [parse_conversation(record.fields, record.where) for record in json_lines(path)]
    if not rows:
        raise DataError(
            f"{path}: got an empty file, expected at least one conversation; "
            "write one JSON object a line"
        )
    return rows


def write_conversations(path: Path, rows: Iterable[Conversation]) -> str:
    """Writes `rows` as JSONL and returns the sha256 of the file, as 64 hex digits."""
    blob = "".join(_to_line(row) for row in rows).encode()
    path.write_bytes(blob)
    return hashlib.sha256(blob).hexdigest()


def _to_line(row: Conversation) -> str:
    record: dict[str, Any] = {
        "messages": [{"role": m.role, "content": m.content} for m in row.messages],
        "label": row.label,
        "source": row.source,
        "group": row.group,
        "kind": row.kind,
    }
    if row.category is not None:
        record["category"] = row.category
    return json.dumps(record, ensure_ascii=False) + "\n"


def parse_conversation(record: dict[str, Any], where: str) -> Conversation:
    """The conversation in the fields of one row.

    Args:
        where: file and line, for messages.
    Raises:
        DataError: a field is missing, unknown or wrong.
    """
    _check_fields(record, where, required=_REQUIRED, optional=_OPTIONAL)
    messages = _parse_messages(record["messages"], where)
    return Conversation(
        messages=messages,
        label=cast(Label, _choice(record, "label", get_args(Label), where)),
        source=_text(record, "source", where),
        category=_text(record, "category", where) if record.get("category") is not None else None,
        group=_text(record, "group", where) if "group" in record else default_group(messages),
        kind=cast(Kind, _choice(record, "kind", get_args(Kind), where, default="completion")),
    )


def _parse_messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: got messages={shown(value)}, expected a list of role and content objects; "
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    messages = []
    for index, item in enumerate(value):
        spot = f"{where}: messages[{index}]"
        if not isinstance(item, dict):
            raise DataError(
                f"{spot}: got {shown(item)}, expected an object with role and content; "
                'write {"role": "user", "content": "..."}'
            )
        _check_fields(item, spot, required=("role", "content"), optional=())
        role = cast(Role, _choice(item, "role", get_args(Role), spot))
        messages.append(Message(role, _text(item, "content", spot)))
    _check_order([m.role for m in messages], where)
    return tuple(messages)


def _check_order(roles: list[Role], where: str) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise DataError(
            f"{where}: got roles {', '.join(roles)}, expected an optional system turn, then user "
            "and assistant in turns with the assistant last; reorder or complete the messages"
        )


def _check_fields(
    record: dict[str, Any], where: str, *, required: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    missing = [name for name in required if name not in record]
    if missing:
        raise DataError(
            f"{where}: got no {', '.join(missing)}, expected {', '.join(required)}; "
            "add the missing fields"
        )
    unknown = sorted(set(record) - set(required) - set(optional))
    if unknown:
        known = ", ".join((*required, *optional))
        raise DataError(
            f"{where}: got unknown fields {_names(unknown)}, expected only {known}; "
            "remove or rename them"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names).encode("utf-8", "backslashreplace").decode()


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: got {name}={shown(value)}, expected text that is not blank; "
            "fill it in or drop the line"
        )
    # JSON may carry a lone surrogate, which no tokenizer and no UTF-8 file can hold.
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(
            f"{where}: got a lone surrogate in {name}, expected Unicode text; "
            "write the character itself instead of half of an escape pair"
        )
    return value


def _choice(
    record: dict[str, Any],
    name: str,
    choices: tuple[str, ...],
    where: str,
    *,
    default: str | None = None,
) -> str:
    value = record.get(name, default)
    if value not in choices:
        raise DataError(
            f"{where}: got {name}={shown(value)}, expected one of {', '.join(choices)}; correct it"
        )
    assert isinstance(value, str)
    return value
