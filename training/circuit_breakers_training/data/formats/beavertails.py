"""BeaverTails (Ji et al., arXiv 2307.04657): answers to probing prompts, judged for harm.

A row has `prompt`, `response`, `category` (a flag for each of 14 harms) and `is_safe`. One answer
may come several times, judged by different people; rows that contradict each other are dropped on
import.
"""

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.formats.format import (
    Dropped,
    Format,
    Loaded,
    answered,
    flag,
    text,
)
from circuit_breakers_training.data.records import Record, shown

__all__ = ["BEAVERTAILS"]


def _row(record: Record) -> Loaded:
    prompt, response = text(record, "prompt"), text(record, "response")
    is_safe, category = flag(record, "is_safe"), _category(record)
    if is_safe is None:
        return Dropped("no label")
    if is_safe:
        # The prompts are not judged, and most of them probe for harm: such a row must not set the
        # threshold of a guard that reads prompts.
        return answered(prompt, response, "benign", source="beavertails", kind="refusal")
    return answered(prompt, response, "harmful", source="beavertails", category=category)


def _category(record: Record) -> str | None:
    """The first harm that is flagged."""
    value = record.fields.get("category")
    if value is None or isinstance(value, str):
        return text(record, "category")
    if not isinstance(value, dict) or not all(isinstance(on, bool) for on in value.values()):
        raise DataError(
            f"{record.where}: got category={shown(value)}, expected a flag for each harm; "
            "correct the row, or name another format"
        )
    return next((name for name, on in value.items() if on), None)


BEAVERTAILS = Format(
    name="beavertails",
    columns=("prompt", "response", "is_safe"),
    signature=("prompt", "response", "is_safe"),
    load=_row,
)
