"""The formats by name, and how one is told from the columns of a file."""

from collections.abc import Mapping
from typing import Any, Final

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.beavertails import BEAVERTAILS
from circuit_breakers_training.data.formats.chat import ULTRACHAT, ULTRACHAT_FIRST
from circuit_breakers_training.data.formats.circuit_breakers import (
    CIRCUIT_BREAKERS,
    CIRCUIT_BREAKERS_REFUSALS,
)
from circuit_breakers_training.data.formats.format import Format, column_names
from circuit_breakers_training.data.formats.harmbench import HARMBENCH
from circuit_breakers_training.data.formats.wildguard import WILDGUARD
from circuit_breakers_training.data.formats.xstest import XSTEST, XSTEST_PROMPTS
from circuit_breakers_training.data.jsonl import parse_conversation
from circuit_breakers_training.data.records import Record, shown

__all__ = ["CONVERSATIONS", "FORMATS", "detect_format", "get_format"]

CONVERSATIONS = Format(
    name="conversations",
    columns=("messages", "label", "source"),
    signature=("messages", "label", "source"),
    load=lambda record: parse_conversation(record.fields, record.where),
)
"""Our own, described in README.md."""

FORMATS: Final[Mapping[str, Format]] = {
    known.name: known
    for known in (
        CONVERSATIONS,
        CIRCUIT_BREAKERS,
        CIRCUIT_BREAKERS_REFUSALS,
        ULTRACHAT,
        ULTRACHAT_FIRST,
        XSTEST,
        XSTEST_PROMPTS,
        WILDGUARD,
        BEAVERTAILS,
        HARMBENCH,
    )
}
"""By name. No two signatures fit the same published file."""


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        DataError: there is none.
    """
    if name not in FORMATS:
        raise DataError(
            f"got the format {shown(name)}, expected one of {', '.join(FORMATS)}; correct it"
        )
    return FORMATS[name]


def detect_format(record: Record) -> Format:
    """The format that the columns of a file's first row give away.

    Raises:
        DataError: none, or more than one.
    """
    found = [known for known in FORMATS.values() if _fits(known, record.fields)]
    if len(found) == 1:
        return found[0]
    signatures = [
        f"{known.name} ({', '.join(known.signature)})"
        for known in found or FORMATS.values()
        if known.signature
    ]
    raise DataError(
        f"{record.where}: got the columns {column_names(record.fields)}, which fit "
        f"{'several formats' if found else 'no format'}, expected those of one: "
        f"{', '.join(signatures)}; name the format, or rename the columns"
    )


def _fits(known: Format, fields: Mapping[str, Any]) -> bool:
    return known.signature is not None and set(known.signature) <= fields.keys()
