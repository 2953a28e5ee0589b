"""Requests that a suite is made of: from the test split of a dataset, or from a user's file.

A file is JSONL of our own (`read_jsonl_prompts`), or a published set such as HarmBench's behaviours
or XSTest's prompts, told by its columns (data/formats).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast, get_args

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.data.plan import REWORDED_SOURCES
from circuit_breakers_training.data.sources import SourceSpec, locate, read_evaluation_rows
from circuit_breakers_training.probe.selection import expected_verdict

__all__ = [
    "LOOK_ALIKE_SOURCES",
    "PROMPT_READERS",
    "EvalPrompt",
    "PromptReader",
    "dataset_prompts",
    "gather_prompts",
    "read_jsonl_prompts",
    "read_prompts",
    "read_published_prompts",
]

LOOK_ALIKE_SOURCES: Final = ("twin", "homonym", "follow_up")
"""Benign sources of a built dataset that resemble harmful requests in words or place."""

_REQUIRED = ("prompt", "label")
_OPTIONAL = ("category",)


@dataclass(frozen=True, kw_only=True)
class EvalPrompt:
    """A request that waits for the assistant."""

    messages: tuple[Message, ...]
    """Ends with the user's turn."""
    label: Label
    """Says what is asked for."""
    source: str
    category: str | None = None
    look_alike: bool = False
    """Benign, and easily taken for harmful."""

    @property
    def request(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class PromptReader(Protocol):
    """Reads one kind of prompt file."""

    def __call__(self, path: Path) -> list[EvalPrompt]:
        """All prompts, in file order.

        Raises:
            DataError: the file is missing, empty or wrong, with file, line and cure.
        """
        ...


def dataset_prompts(dataset: Dataset) -> list[EvalPrompt]:
    """Prompts of the test split, each once, in its first words.

    Those with a refused harmful request are left out.
    """
    found: dict[tuple[Message, ...], EvalPrompt] = {}
    for row in dataset.test:
        # Suites have wordings of their own.
        if expected_verdict(row) == "refused" or row.source in REWORDED_SOURCES.values():
            continue
        messages = row.messages[:-1]
        found.setdefault(
            messages,
            EvalPrompt(
                messages=messages,
                label=row.label,
                source=row.source,
                category=row.category,
                look_alike=row.label == "benign" and row.source in LOOK_ALIKE_SOURCES,
            ),
        )
    return list(found.values())


def gather_prompts(dataset: Dataset | None, files: Sequence[Path]) -> list[EvalPrompt]:
    """Prompts of the files; for a label that no file has, those of the dataset's test split.

    Raises:
        DataError: a file cannot be read.
    """
    own = [prompt for file in files for prompt in read_prompts(file)]
    given = {prompt.label for prompt in own}
    rest = dataset_prompts(dataset) if dataset is not None else []
    everything = [*own, *(prompt for prompt in rest if prompt.label not in given)]
    return list({prompt.messages: prompt for prompt in reversed(everything)}.values())[::-1]


def read_prompts(path: Path) -> list[EvalPrompt]:
    """Prompts of a file, by the reader of its suffix.

    Raises:
        DataError: no reader for the suffix, or the file is wrong.
    """
    reader = PROMPT_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: got a file ending in {path.suffix!r}, expected "
            f"{', '.join(PROMPT_READERS)}; convert the file"
        )
    return reader(path)


def read_jsonl_prompts(path: Path) -> list[EvalPrompt]:
    """Prompts of a JSONL file: {"prompt": ..., "label": "harmful" or "benign", "category": ...}.

    Benign prompts of a file count as look-alikes: that is what such files are collected for.

    Raises:
        DataError: the file is missing, empty or wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read ({e}), expected UTF-8 JSONL; check it") from e
    prompts = [
        _parse(line, f"{path}:{number}", path.stem)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{path}: got no prompts, expected one JSON object a line; add some")
    return prompts


def read_published_prompts(path: Path) -> list[EvalPrompt]:
    """Prompts of a published set, each once; its benign ones count as look-alikes.

    Answers that the set has are left out: both models write their own.

    Raises:
        DataError: the format cannot be told from the columns, a row is wrong, or no row is of use.
    """
    found = read_evaluation_rows(locate(SourceSpec(location=str(path))))
    prompts: dict[tuple[Message, ...], EvalPrompt] = {}
    for row in found.rows:
        messages = row.messages
        if isinstance(row, Conversation):
            if expected_verdict(row) == "refused":
                found.dropped["refused harmful request"] += 1
                continue
            messages = messages[:-1]
        prompts.setdefault(
            messages,
            EvalPrompt(
                messages=messages,
                label=row.label,
                source=row.source,
                category=row.category,
                look_alike=row.label == "benign",
            ),
        )
    if not prompts:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in found.dropped.items())
        raise DataError(
            f"{path}: got {found.num_read} rows of format {found.format!r} and no prompt of use "
            f"({reasons}), expected some; check the file"
        )
    return list(prompts.values())


PROMPT_READERS: Final[Mapping[str, PromptReader]] = {
    ".jsonl": read_jsonl_prompts,
    ".csv": read_published_prompts,
    ".json": read_published_prompts,
    ".parquet": read_published_prompts,
}
"""By suffix of the file."""


def _parse(line: str, where: str, source: str) -> EvalPrompt:
    try:
        record: Any = json.loads(line)
    except ValueError as e:
        raise DataError(
            f"{where}: got invalid JSON ({e}), expected one object; write one object a line"
        ) from None
    fields = set(record) if isinstance(record, dict) else set()
    if not set(_REQUIRED) <= fields <= {*_REQUIRED, *_OPTIONAL}:
        raise DataError(
            f"{where}: got fields {', '.join(sorted(fields)) or 'none'}, expected "
            f"{', '.join(_REQUIRED)} and perhaps {', '.join(_OPTIONAL)}; rename or remove the rest"
        )
    label, text, category = record["label"], record["prompt"], record.get("category")
    if label not in get_args(Label):
        raise DataError(f"{where}: got label={label!r}, expected harmful or benign; correct it")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: got prompt={text!r}, expected text that is not blank; fill it")
    if category is not None and not isinstance(category, str):
        raise DataError(f"{where}: got category={category!r}, expected text; correct or drop it")
    return EvalPrompt(
        messages=(Message("user", text),),
        label=cast(Label, label),
        source=source,
        category=category,
        look_alike=label == "benign",
    )
