"""The text of each single token, so that together they are the text that vLLM gives out.

A character may take several tokens: its text is the last one's, and that of the others is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

__all__ = ["CompletionTexts", "prompt_texts"]


class CompletionTexts:
    """Texts of the tokens of one completion, by vLLM's own detokenizer.

    Where there are stop strings, it gives the last characters out later than their tokens, and none
    of a stop string.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: Any) -> None:
        """Starts at the end of a prompt.

        Args:
            params: vLLM's sampling parameters, as the engine has them.
        """
        self._detokenizer = _detokenizer(tokenizer, prompt_token_ids, params)
        self._ends: list[int] = []
        """Characters up to and with each token."""
        self._stopped_at: int | None = None
        """The token that completed a stop string."""
        self._num_released = 0

    def feed(self, token_ids: Iterable[int]) -> None:
        """Takes the next tokens."""
        for token_id in token_ids:
            if self._detokenizer.update([token_id], False) is not None:
                self._stopped_at = len(self._ends)
            self._ends.append(len(self._detokenizer.output_text))

    def release(self, *, has_ended: bool) -> list[str | None]:
        """Texts of the tokens that are out by now, and were not by the last call.

        Args:
            has_ended: no further token comes.
        Returns:
            A part, where a stop string begins within a token; None for one that is not out at all.
        """
        text: str = self._detokenizer.output_text
        num_out = len(text) - (0 if has_ended else self._detokenizer.stop_buffer_length)
        released = []
        for i in range(self._num_released, len(self._ends)):
            if self._ends[i] > num_out and not has_ended:
                break
            start = self._ends[i - 1] if i else 0
            is_cut = self._ends[i] > len(text) or i == self._stopped_at
            released.append(text[start : self._ends[i]] or (None if is_cut else ""))
        self._num_released += len(released)
        return released


def prompt_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Texts of the tokens of a prompt, those of its template included."""
    from vllm import SamplingParams

    detokenizer = _detokenizer(tokenizer, (), SamplingParams(skip_special_tokens=False))
    texts = []
    for token_id in token_ids:
        start = len(detokenizer.output_text)
        detokenizer.update([token_id], False)
        texts.append(detokenizer.output_text[start:])
    return texts


def _detokenizer(tokenizer: Any, prompt_token_ids: Sequence[int], params: Any) -> Any:
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request: Any = SimpleNamespace(
        request_id="token texts",
        prompt_token_ids=list(prompt_token_ids),
        prompt_embeds=None,
        sampling_params=params,
    )
    return IncrementalDetokenizer.from_new_request(tokenizer, request)
