"""Harmful training conversations whose last user turn is blank.

Half of the published Llama-3 run's rows have one (arXiv 2406.04313, reference implementation): the
adapter then has to reroute the response by what it says, not by what was asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation, Message

__all__ = ["BlankedSet", "blank_prompts"]

_PROBE = "blank-turn-probe"


class BlankedSet(NamedTuple):
    conversations: list[Conversation]
    """As given and in that order, some with a blank last user turn."""
    num_blanked: int


def blank_prompts(
    conversations: Sequence[Conversation], *, share: float, seed: int, tokenizer: Any
) -> BlankedSet:
    """About a `share` of the conversations with their last user turn blanked.

    Which ones depends on the seed and on each conversation alone: added rows change no other row.

    Raises:
        DataError: the chat template cannot render a turn without content as it renders others.
    """
    rows = [_blank(row) if _position(row, seed) < share else row for row in conversations]
    num_blanked = sum(new is not old for new, old in zip(rows, conversations, strict=True))
    if num_blanked:
        _check_template(tokenizer, share)
    return BlankedSet(rows, num_blanked)


def _position(row: Conversation, seed: int) -> float:
    """A number in [0, 1) that only this conversation under this seed has."""
    text = json.dumps([seed, [[m.role, m.content] for m in row.messages]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _blank(row: Conversation) -> Conversation:
    *earlier, asked, answer = row.messages
    return replace(row, messages=(*earlier, Message(asked.role, ""), answer))


def _check_template(tokenizer: Any, share: float) -> None:
    def prompt(content: str) -> str:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )

    try:
        renders = prompt("") == prompt(_PROBE).replace(_PROBE, "")
        got = "one that leaves out or rewrites such turns"
    except (TemplateError, ValueError) as error:
        renders, got = False, f"one that refuses them ({error})"
    if not renders:
        raise DataError(
            f"data.blank_prompt_share is {share}, which needs a chat template that renders a user "
            f"turn without content; got {got}; set data.blank_prompt_share to 0"
        )
