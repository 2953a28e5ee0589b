"""The rows of several sources together: duplicates, groups, and why a row was left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from circuit_breakers_training.data.groups import content_words, merge_near_duplicates
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.plan import Planned

__all__ = ["Entry", "Pool", "Row"]

Row = Conversation | Planned
"""Planned is a prompt without an answer."""

_TELLING_WORDS: Final = 4
"""Content words from which a later user turn says what a conversation is about: "Thanks, tell me
more" would make one group of thousands of chats."""


@dataclass(frozen=True)
class Entry:
    """A row and where it came from."""

    row: Row
    source: int
    """Number of its source."""


class Pool:
    """Rows that are left, in the order of their sources, and the count of the others.

    Args:
        sources: the rows of each source.
    """

    def __init__(self, sources: Sequence[Iterable[Row]]) -> None:
        self.entries = [Entry(row, k) for k, rows in enumerate(sources) for row in rows]
        self.dropped: list[Counter[str]] = [Counter() for _ in sources]
        """Rows left out of each source, by reason."""

    def drop_if(self, is_out: Callable[[Row], bool], reason: str) -> None:
        """Leaves out the rows that `is_out` holds for."""
        self.replace_rows(lambda row: reason if is_out(row) else row)

    def replace_rows(self, change: Callable[[Row], Row | str]) -> None:
        """Puts what `change` returns in place of each row; a text is the reason to leave it out."""
        entries = []
        for entry in self.entries:
            changed = change(entry.row)
            if isinstance(changed, str):
                self.dropped[entry.source][changed] += 1
            else:
                entries.append(replace(entry, row=changed))
        self.entries = entries

    def drop_duplicates(self) -> None:
        """Leaves out all but the first of equal conversations, and all that differ in their label.

        The label is about the text: two labels of one text cannot both be right.
        """
        labels: dict[bytes, set[str]] = {}
        for entry in self.entries:
            labels.setdefault(_text_digest(entry.row), set()).add(entry.row.label)
        seen: set[bytes] = set()

        def keep_first(row: Row) -> Row | str:
            digest = _text_digest(row)
            if len(labels[digest]) > 1:
                return "contradictory labels"
            if digest in seen:
                return "exact duplicate"
            seen.add(digest)
            return row

        self.replace_rows(keep_first)

    def user_turns(self) -> list[str]:
        """Everything that a user says, each text once."""
        turns = (m.content for e in self.entries for m in e.row.messages if m.role == "user")
        return list(dict.fromkeys(turns))

    def merge_groups(self) -> None:
        """Makes one group of rows whose prompts use nearly the same words.

        The first user turn counts, and later ones with at least four content words.
        """
        texts, owners = [], []
        for entry in self.entries:
            turns = [m.content for m in entry.row.messages if m.role == "user"]
            for position, turn in enumerate(turns):
                if position == 0 or len(content_words(turn)) >= _TELLING_WORDS:
                    texts.append(turn)
                    owners.append(entry.row.group)
        merged = dict(zip(owners, merge_near_duplicates(texts, owners), strict=True))
        self.replace_rows(lambda row: replace(row, group=merged[row.group]))

    def group_sizes(self) -> dict[str, int]:
        """Number of groups, and rows of the largest one."""
        sizes = Counter(entry.row.group for entry in self.entries)
        return {"groups": len(sizes), "largest": max(sizes.values(), default=0)}


def _text_digest(row: Row) -> bytes:
    turns = [(message.role, message.content) for message in row.messages]
    return hashlib.sha256(json.dumps(turns).encode()).digest()
