"""What was lost: tokens that should never have been sent, and trips that the audit log lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..server.api.oracle import MARGIN, Oracle
from .traffic import Answer, Choice

__all__ = ["Judge", "missing_trips"]


class Judge:
    """Asks transformers about each text that a client got."""

    def __init__(self, oracle: Oracle, tokenizer: Any) -> None:
        self._oracle, self._tokenizer = oracle, tokenizer
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def num_unguarded(self, answers: Iterable[Answer]) -> int:
        """Tokens from the first one on that should have tripped, and texts without their tokens."""
        return sum(
            self._num_unguarded(answer.prompt_ids, choice)
            for answer in answers
            for choice in answer.choices
        )

    def _num_unguarded(self, prompt_ids: Sequence[int], choice: Choice) -> int:
        # Text may lag behind its tokens, never run ahead.
        if not self._tokenizer.decode(choice.token_ids).startswith(choice.text):
            return len(choice.token_ids) + 1
        if not choice.token_ids:
            return 0
        assert prompt_ids, "a stream says its prompt with the first token"
        key = len(prompt_ids), (*prompt_ids, *choice.token_ids)
        if key not in self._known:
            peak_T = self._oracle(list(key[1]))
            # Position 0 is an attention sink, which is not judged.
            past = [t for t in range(1, len(peak_T)) if peak_T[t] >= MARGIN]
            first = max(past[0], len(prompt_ids)) if past else len(peak_T)
            self._known[key] = len(peak_T) - first
        return self._known[key]


def missing_trips(answers: Iterable[Answer], logged: Iterable[str]) -> list[str]:
    """Requests whose clients were told of more trips than the log has."""
    told: Counter[str] = Counter()
    for answer in answers:
        if answer.num_told_trips:
            told[answer.request_id] += answer.num_told_trips
    return sorted((told - Counter(logged)).elements())
