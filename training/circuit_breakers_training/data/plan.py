"""What the model is asked to write: every prompt with its label, group, split and first words."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeVar

from circuit_breakers_training.data import prompt_lists
from circuit_breakers_training.data.extras import read_extra_set
from circuit_breakers_training.data.groups import drop_near_duplicates, merge_near_duplicates
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message, default_group
from circuit_breakers_training.data.rewordings import reword
from circuit_breakers_training.data.split import DEFAULT_FRACTIONS, split_of

__all__ = [
    "BENIGN_FRACTIONS",
    "REWORDED_SOURCES",
    "SAMPLED_FRACTIONS",
    "Planned",
    "plan_after_refusals",
    "plan_refusals",
    "plan_rows",
    "plan_sampled",
    "plan_written",
]

_T = TypeVar("_T")

BENIGN_FRACTIONS: Final[Mapping[str, float]] = {
    "train": 0.44,
    "selection": 0.08,
    "calibration": 0.32,
    "test": 0.16,
}
"""Splits of written groups without a harmful prompt: calibration and test need benign
conversations of every kind more than train does."""

SAMPLED_FRACTIONS: Final[Mapping[str, float]] = {
    "train": 0.35,
    "selection": 0.05,
    "calibration": 0.40,
    "test": 0.20,
}
"""Splits of prompts sampled from the model. Calibration needs 299 benign conversations for a
false-positive rate of 1 % at 95 % confidence with none tripping, and 773 with three."""

REWORDED_SOURCES: Final[Mapping[str, str]] = {
    "harmful": "harmful_reworded",
    "twin": "twin_reworded",
}
"""Sources whose prompts also appear in other words, and the source of those."""

# The same first words for harmful and for half of the benign rows: they must not be the signal.
_PREFILLS: Final = (
    "Sure, here is",
    "Sure! Here are",
    "Of course. Here is a detailed",
    "Here are the steps:\n\nStep 1:",
    "Here is what you need to know:\n\n1.",
    "Certainly! First,",
    "Absolutely. To begin with,",
    "Yes, I can help you with that. The first thing to do is",
    "No problem. Let's start with",
    "Title:",
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A conversation that lacks its last assistant turn, or the end of it."""

    messages: tuple[Message, ...]
    label: Label
    source: str
    category: str | None = None
    group: str
    split: str = ""
    prefill: str = ""
    """First words of the assistant's turn, given to the model."""
    original: str | None = None
    """The last user turn before it was reworded; None if it is as it was."""

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return self.messages[-1].content

    @property
    def request(self) -> str:
        """What is asked for, in its first words."""
        return self.prompt if self.original is None else self.original

    def finish(self, text: str) -> Conversation:
        """The conversation with the model's `text` after the prefill."""
        kind: Kind = "prefilled" if self.prefill else "completion"
        return self._with_response((self.prefill + text).strip(), self.label, self.source, kind)

    def refuse(self, refusal: str) -> Conversation:
        """The conversation with a refusal, which is benign whatever was asked."""
        return self._with_response(refusal, "benign", "refusal", "refusal")

    def _with_response(self, text: str, label: Label, source: str, kind: Kind) -> Conversation:
        return Conversation(
            messages=(*self.messages, Message("assistant", text)),
            label=label,
            source=source,
            category=self.category,
            group=self.group,
            kind=kind,
        )


def plan_written(
    seed: int, extra_sets: Sequence[str] = (), limit: int | None = None
) -> list[Planned]:
    """Written prompts and those of `extra_sets`, with group and split, without prefills.

    Args:
        limit: prompts (or pairs) taken of each list; all by default.
    """
    rows = []
    pairs = prompt_lists.twin_pairs()
    for pair in _evenly(pairs, limit):
        for text, label, source in (
            (pair.harmful, "harmful", "harmful"),
            (pair.benign, "benign", "twin"),
        ):
            rows.append(
                Planned(
                    messages=(Message("user", text),),
                    label="harmful" if label == "harmful" else "benign",
                    source=source,
                    category=pair.category,
                    group=pair.group,
                )
            )
    for source, prompts in (
        ("homonym", prompt_lists.homonyms()),
        ("topic", prompt_lists.topics()),
        ("follow_up", prompt_lists.follow_ups()),
    ):
        rows += [
            Planned(
                messages=prompt.messages,
                label="benign",
                source=source,
                category=prompt.category,
                group=prompt.group,
            )
            for prompt in _evenly(prompts, limit)
        ]
    for name in extra_sets:
        rows += _plan_extra(name, [row.prompt for row in rows], limit)
    return _with_splits(rows, seed)


def plan_sampled(prompts: Iterable[str], seed: int) -> list[Planned]:
    """Prompts that were sampled from the model, each a group of its own."""
    rows = []
    for text in prompts:
        messages = (Message("user", text),)
        group = "m-" + default_group(messages)[:16]
        split = split_of(group, seed=seed, fractions=SAMPLED_FRACTIONS)
        rows.append(
            Planned(messages=messages, label="benign", source="sampled", group=group, split=split)
        )
    return rows


def plan_rows(rows: Iterable[Planned], *, seed: int, harmful_samples: int) -> list[Planned]:
    """One entry for each text to generate, with its prefill.

    The first text of a harmful prompt is prefilled: a model that would refuse answers then. Further
    ones are asked for as the prompt stands, and in other words, in turns: `harmful_samples` in all
    in train; elsewhere one of both. Benign prompts are prefilled by half. Twins appear in other
    words, too: all in train, as the harmful prompts do; elsewhere a half, in calibration and test
    instead of the twin, since each conversation counts as one of its own there.
    """
    planned = []
    for row in rows:
        draw = _draw(seed, "prefill", row.prompt)
        first_words = _PREFILLS[draw % len(_PREFILLS)]
        if row.label == "harmful":
            planned.append(replace(row, prefill=first_words))
            planned += _unprefilled(row, seed, harmful_samples - 1)
            continue
        other = _draw(seed, "reword", row.prompt)
        can_reword = harmful_samples > 1 and row.source in REWORDED_SOURCES
        is_reworded = can_reword and (other % 2 or row.split == "train")
        if is_reworded:
            planned.append(_reworded(row, other // 2))
        if not is_reworded or row.split in ("train", "selection"):
            half = _draw(seed, "half", row.prompt) % 2
            planned.append(replace(row, prefill=first_words) if half else row)
    return planned


def _unprefilled(row: Planned, seed: int, count: int) -> list[Planned]:
    """More texts for a harmful prompt: as it stands, reworded, as it stands, ..."""
    draw = _draw(seed, "reword", row.prompt)
    can_reword = row.source in REWORDED_SOURCES
    if row.split != "train":
        start, count = draw % 2, min(count, 1)
    else:
        start = 0
    return [
        _reworded(row, draw // 2 + k) if k % 2 and can_reword else row
        for k in range(start, start + count)
    ]


def _reworded(row: Planned, draw: int) -> Planned:
    turn = Message("user", reword(row.prompt, draw))
    return replace(
        row,
        messages=(*row.messages[:-1], turn),
        source=REWORDED_SOURCES[row.source],
        original=row.prompt,
    )


def plan_after_refusals(rows: Sequence[Planned], *, seed: int) -> list[Planned]:
    """Second turns behind a refused request: in train, for a quarter of the harmful prompts.

    The prompt is refused in written words; then it is asked again, or its twin is: what follows a
    refused request is as harmful as it is itself.
    """
    texts = prompt_lists.refusals()
    planned = []
    for row, twin in pairwise(rows):
        draw = _draw(seed, "asked again", row.prompt)
        if (row.source, twin.source) != ("harmful", "twin") or row.split != "train" or draw % 4:
            continue
        refused = (*row.messages, Message("assistant", texts[draw // 4 % len(texts)]))
        for asked, source, category in (
            (row, "harmful_after_refusal", row.category),
            (twin, "twin_after_refusal", "after_refusal"),
        ):
            messages = (*refused, *asked.messages)
            planned.append(replace(asked, messages=messages, source=source, category=category))
    return planned


def plan_refusals(rows: Iterable[Planned], *, seed: int, count: int) -> list[Conversation]:
    """`count` harmful train prompts with a written refusal; fewer if there are fewer prompts."""
    texts = prompt_lists.refusals()
    harmful = [row for row in rows if row.label == "harmful" and row.split == "train"]
    harmful.sort(key=lambda row: _draw(seed, "refused", row.prompt))
    return [row.refuse(texts[i % len(texts)]) for i, row in enumerate(harmful[:count])]


def _plan_extra(name: str, taken: Sequence[str], limit: int | None) -> list[Planned]:
    prompts = drop_near_duplicates(read_extra_set(name), against=taken)
    rows = []
    for text in _evenly(prompts, limit):
        messages = (Message("user", re.sub(r"\s+", " ", text)),)
        group = "x-" + default_group(messages)[:16]
        rows.append(Planned(messages=messages, label="harmful", source=name, group=group))
    return rows


def _with_splits(rows: Sequence[Planned], seed: int) -> list[Planned]:
    # Earlier user turns count too: a follow-up to a refused request is kin to that request.
    texts, owners = [], []
    for row in rows:
        for message in row.messages:
            if message.role == "user":
                texts.append(message.content)
                owners.append(row.group)
    merged = dict(zip(owners, merge_near_duplicates(texts, owners), strict=True))
    harmful = {merged[row.group] for row in rows if row.label == "harmful"}
    placed = []
    for row in rows:
        group = merged[row.group]
        fractions = DEFAULT_FRACTIONS if group in harmful else BENIGN_FRACTIONS
        split = split_of(group, seed=seed, fractions=fractions)
        placed.append(replace(row, group=group, split=split))
    return placed


def _evenly(items: Sequence[_T], limit: int | None) -> Sequence[_T]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _draw(seed: int, purpose: str, text: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8])
