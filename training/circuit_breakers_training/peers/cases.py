"""The conversations that all guards are fitted, calibrated and tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.evaluation.suites import evenly
from circuit_breakers_training.probe.calibration import min_conversations, num_trips_allowed
from circuit_breakers_training.probe.selection import expected_verdict
from circuit_breakers_training.render import Rendered, render_all

__all__ = ["Case", "Cases", "Way", "gather_cases", "look_points"]

Way = Literal["prompt", "whole", "growing"]
"""What a text guard reads: the prompt; prompt and answer at the end; the same every few tokens."""

_TURN_BREAK: Final = "\n\n"


@dataclass(frozen=True, eq=False)
class Case:
    """One conversation, as text and as the tokens that a model reads."""

    conversation: Conversation
    rendered: Rendered
    tokenizer: Any

    @property
    def harmful(self) -> bool:
        """What a guard should say."""
        return self.conversation.label == "harmful"

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that a reader gets if nothing stops them."""
        return len(self.rendered.ids) - self.rendered.num_prompt_tokens

    @cached_property
    def prompt(self) -> str:
        """All turns before the answer."""
        return _TURN_BREAK.join(m.content for m in self.conversation.messages[:-1])

    def text(self, num_tokens: int) -> str:
        """The prompt, and the first tokens of the answer."""
        if not num_tokens:
            return self.prompt
        begin = self.rendered.num_prompt_tokens
        ids = list(self.rendered.ids[begin : begin + num_tokens])
        return self.prompt + _TURN_BREAK + self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, kw_only=True)
class Cases:
    """By split; refused harmful requests, which are neither right nor wrong to stop, are left out.

    Of train and selection, which only text guards are fitted on, nothing is cut.
    """

    train: tuple[Case, ...]
    selection: tuple[Case, ...]
    calibration: tuple[Case, ...]
    """Benign ones."""
    test: tuple[Case, ...]


def gather_cases(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    target_fpr: float,
    confidence: float,
    limit: int | None,
) -> Cases:
    """All cases, or some.

    Args:
        max_length: tokens of a conversation; its end is cut.
        limit: test cases of each label at most, and calibration cases too, but never fewer than
            the promise needs.
    Raises:
        DataError: a split lacks a label.
        CalibrationError: too few benign conversations for the promise.
    """

    def labelled(split: str, rows: Sequence[Conversation], most: int | None) -> tuple[Case, ...]:
        by_label = {
            label: [row for row in rows if expected_verdict(row) == label]
            for label in ("benign", "harmful")
        }
        for label, own in by_label.items():
            if not own:
                raise DataError(
                    f"got no {label} conversation among {len(rows)} of the {split} split, expected "
                    "some; a guard cannot be compared on nothing: give a dataset that has both"
                )
        kept = [row for own in by_label.values() for row in evenly(own, most or len(own))]
        return _cases(kept, tokenizer, max_length)

    benign = [row for row in dataset.calibration if expected_verdict(row) == "benign"]
    if limit is not None:
        benign = list(evenly(benign, max(limit, min_conversations(target_fpr, confidence))))
    calibration = _cases(benign, tokenizer, max_length)
    num_trips_allowed(len(calibration), target_fpr, confidence)
    return Cases(
        train=labelled("train", dataset.train, None),
        selection=labelled("selection", dataset.selection, None),
        calibration=calibration,
        test=labelled("test", dataset.test, limit),
    )


def look_points(case: Case, way: Way, every: int) -> tuple[int, ...]:
    """How many answer tokens are there at each look of a text guard."""
    num = case.num_answer_tokens
    if way == "prompt":
        return (0,)
    if way == "whole":
        return (num,)
    return (*range(0, num, every), num)


def _cases(rows: Sequence[Conversation], tokenizer: Any, max_length: int) -> tuple[Case, ...]:
    rendered = render_all(tokenizer, rows, max_length=max_length)
    return tuple(
        Case(rows[index], row, tokenizer)
        for index, row in zip(rendered.kept, rendered.rows, strict=True)
    )
