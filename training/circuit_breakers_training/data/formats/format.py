"""What a format is, and the checks that all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message, default_group
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.records import Record, shown

__all__ = [
    "Dropped",
    "Format",
    "Loaded",
    "answered",
    "choice",
    "column_names",
    "flag",
    "message_text",
    "open_prompt",
    "require_columns",
    "text",
]


@dataclass(frozen=True)
class Dropped:
    """A row that is sound and of no use."""

    reason: str


Loaded = Conversation | Planned | Dropped
"""Planned: a prompt without an answer, which the model has yet to write."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A published layout of rows."""

    name: str
    columns: tuple[str, ...]
    """Columns that every row must have; others are ignored."""
    load: Callable[[Record], Loaded]
    """What a row with these columns becomes; raises DataError for a wrong value."""
    signature: tuple[str, ...] | None = None
    """Columns that give the format away when none is named; None if it has to be named."""
    evaluation_only: bool = False
    """A test set: refused as training data."""


def require_columns(record: Record, wanted: Format) -> None:
    """Checks that a row has the format's columns.

    Raises:
        DataError: it has not.
    """
    if set(wanted.columns) <= record.fields.keys():
        return
    raise DataError(
        f"{record.where}: got the columns {column_names(record.fields)}, expected "
        f"{', '.join(wanted.columns)} of the format {wanted.name!r}; name another format, or "
        "rename the columns"
    )


def column_names(fields: Mapping[str, Any]) -> str:
    """Names of a row's columns, for a message."""
    return ", ".join(shown(name) for name in fields) or "none"


def text(record: Record, name: str) -> str:
    """The text in a column, without blanks around it; empty if there is none.

    Raises:
        DataError: the value is no text.
    """
    value = record.fields.get(name)
    return "" if value is None else message_text(value, f"{record.where}: {name}")


def message_text(value: object, where: str) -> str:
    """`value` without blanks around it.

    Raises:
        DataError: it is no text, or not Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: got {shown(value)}, expected text; correct the row or drop it")
    # JSON may carry a lone surrogate, which no tokenizer and no UTF-8 file can hold.
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(
            f"{where}: got a lone surrogate, expected Unicode text; correct the row or drop it"
        )
    return value.strip()


def choice(record: Record, name: str, choices: tuple[str, ...]) -> str | None:
    """The value of a column with few values; None if it is empty.

    Raises:
        DataError: it is another value.
    """
    value = text(record, name)
    if not value:
        return None
    if value not in choices:
        raise DataError(
            f"{record.where}: got {name}={shown(value)}, expected one of {', '.join(choices)}; "
            "correct it, or name another format"
        )
    return value


def flag(record: Record, name: str) -> bool | None:
    """The value of a yes-or-no column, also as CSV spells it; None if it is empty.

    Raises:
        DataError: it is another value.
    """
    value = record.fields.get(name)
    if value is None or isinstance(value, bool):
        return value
    spelled = {"true": True, "false": False, "": None}
    if not isinstance(value, str) or value.strip().lower() not in spelled:
        raise DataError(
            f"{record.where}: got {name}={shown(value)}, expected true or false; correct it"
        )
    return spelled[value.strip().lower()]


def answered(
    prompt: str,
    answer: str,
    label: Label,
    *,
    source: str,
    category: str | None = None,
    kind: Kind = "completion",
) -> Loaded:
    """The conversation of one prompt and one answer, or why there is none."""
    if not prompt:
        return Dropped("empty prompt")
    if not answer:
        return Dropped("empty answer")
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(
        messages=messages,
        label=label,
        source=source,
        category=category or None,
        group=default_group(messages),
        kind=kind,
    )


def open_prompt(
    messages: tuple[Message, ...], label: Label, *, source: str, category: str | None = None
) -> Planned:
    """A prompt whose answer is missing."""
    return Planned(
        messages=messages,
        label=label,
        source=source,
        category=category or None,
        group=default_group(messages),
    )
