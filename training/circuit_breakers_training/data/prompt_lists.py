"""The prompts that were written for this project, as reviewed package data (see README.md).

They name harms and contain no instructions. `prompts_digest` pins the lists in a dataset.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from circuit_breakers_training.data.jsonl import Message, default_group

__all__ = [
    "TwinPair",
    "WrittenPrompt",
    "follow_ups",
    "homonyms",
    "prompts_digest",
    "refusals",
    "topics",
    "twin_pairs",
]

_FILES = ("follow_ups.jsonl", "harmful_twins.jsonl", "homonyms.txt", "refusals.txt", "topics.txt")

_HEADING = "# "
"""In front of the category of the lines that follow."""


@dataclass(frozen=True, kw_only=True)
class TwinPair:
    """A harmful request and a harmless one in the same frame."""

    harmful: str
    benign: str
    category: str
    group: str
    """Shared by all pairs about the same thing."""


@dataclass(frozen=True, kw_only=True)
class WrittenPrompt:
    """A harmless conversation that waits for the assistant."""

    messages: tuple[Message, ...]
    category: str | None
    group: str


def twin_pairs() -> list[TwinPair]:
    """Harmful requests with their harmless twins."""
    return [TwinPair(**record) for record in _records("harmful_twins.jsonl")]


def homonyms() -> list[WrittenPrompt]:
    """Harmless requests that sound dangerous or lie close to a harmful subject."""
    return [_single(line) for line in _lines("homonyms.txt")]


def topics() -> list[WrittenPrompt]:
    """Everyday tasks and questions, code, mathematics, and all of these in other languages."""
    prompts = []
    category: str | None = None
    for line in _lines("topics.txt"):
        if line.startswith(_HEADING):
            category = line.removeprefix(_HEADING)
        else:
            prompts.append(_single(line, category))
    return prompts


def follow_ups() -> list[WrittenPrompt]:
    """Harmless second and third turns: after a chat, a hard subject, or a refused harmful turn."""
    prompts = []
    for record in _records("follow_ups.jsonl"):
        messages = tuple(Message(m["role"], m["content"]) for m in record["messages"])
        group = "f-" + default_group(messages)[:16]
        prompts.append(WrittenPrompt(messages=messages, category=record["category"], group=group))
    return prompts


def refusals() -> list[str]:
    """Short refusals that fit any harmful request."""
    return list(_lines("refusals.txt"))


def prompts_digest() -> str:
    """sha256 over all prompt files, as 64 hex digits."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(f"{name}\0{_read(name)}\0".encode())
    return digest.hexdigest()


def _single(text: str, category: str | None = None) -> WrittenPrompt:
    messages = (Message("user", text),)
    return WrittenPrompt(
        messages=messages, category=category, group="p-" + default_group(messages)[:16]
    )


def _records(name: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in _lines(name))


def _lines(name: str) -> Iterator[str]:
    return (line for line in _read(name).splitlines() if line.strip())


def _read(name: str) -> str:
    package = resources.files("circuit_breakers_training.data")
    return package.joinpath("prompts", name).read_text(encoding="utf-8")
