"""Splits by hash of the group: a prompt, its twin and its near duplicates are never parted."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation

__all__ = ["DEFAULT_FRACTIONS", "SPLITS", "split_conversations", "split_of"]

SPLITS: Final = ("train", "selection", "calibration", "test")
"""Adapter and probe are fitted on train, settings chosen on selection, the threshold is set on
calibration, and test is only reported."""

DEFAULT_FRACTIONS: Final[Mapping[str, float]] = {
    "train": 0.55,
    "selection": 0.10,
    "calibration": 0.20,
    "test": 0.15,
}


def split_of(group: str, *, seed: int, fractions: Mapping[str, float] = DEFAULT_FRACTIONS) -> str:
    """Split that a group belongs to; depends on nothing else, so added rows move no other row.

    Raises:
        DataError: `fractions` does not name every split or does not sum to 1.
    """
    if set(fractions) != set(SPLITS) or abs(sum(fractions.values()) - 1) > 1e-9:
        raise DataError(
            f"got fractions {dict(fractions)}, expected {', '.join(SPLITS)} with sum 1; "
            "correct them"
        )
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    for name in SPLITS[:-1]:
        if position < fractions[name]:
            return name
        position -= fractions[name]
    return SPLITS[-1]


def split_conversations(
    rows: Iterable[Conversation],
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    *,
    seed: int = 0,
) -> dict[str, tuple[Conversation, ...]]:
    """`rows` by split name, each in the given order; a split may come out empty.

    Raises:
        DataError: `fractions` does not name every split or does not sum to 1.
    """
    parts: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
    for row in rows:
        parts[split_of(row.group, seed=seed, fractions=fractions)].append(row)
    return {name: tuple(part) for name, part in parts.items()}
