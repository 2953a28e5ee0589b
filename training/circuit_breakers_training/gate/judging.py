"""The base model at the gate: what it answers itself, and how the answers of the server read to it.

Texts come without their tokens over HTTP; both sides' are tokenised here, in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

from rich.console import Console

from circuit_breakers.models import resolve_model
from circuit_breakers_training.evaluation.completions import Completion, prompt_ids
from circuit_breakers_training.evaluation.degeneration import DegenerateLimits, check_num_texts
from circuit_breakers_training.evaluation.judges import Verdict
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.sides import judge_texts, reference_limits
from circuit_breakers_training.evaluation.suites import Attempt, reference_attempts
from circuit_breakers_training.fluency import LanguageModel
from circuit_breakers_training.render import Rendered, TemplateSource
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["Judge"]

_BATCH: Final = 32
"""Texts that the base model writes at once."""


class Judge:
    """Answers of the base model, and verdicts on texts."""

    def __init__(
        self,
        *,
        model_id: str,
        chat_template: TemplateSource,
        prompts: Sequence[EvalPrompt],
        max_new_tokens: int,
        degenerate_share: float,
        console: Console | None,
    ) -> None:
        self._model_id = model_id
        self._chat_template = chat_template
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._degenerate_share = degenerate_share
        self._console = console

    @cached_property
    def _model(self) -> LanguageModel:
        return LanguageModel(resolve_model(self._model_id).path, self._chat_template)

    @cached_property
    def limits(self) -> DegenerateLimits:
        """What counts as degenerate.

        Raises:
            CalibrationError: too few benign requests to tell by.
        """
        attempts = reference_attempts(self._prompts)
        check_num_texts(len(attempts), 0, share=self._degenerate_share)
        written = self._completions(attempts, self.base_texts(attempts, "reference"))
        return reference_limits(
            self._model, written, share=self._degenerate_share, console=self._console
        )

    def num_prompt_tokens(self, attempt: Attempt) -> int:
        """Tokens that the server would read."""
        return len(prompt_ids(self._model.tokenizer, attempt))

    def base_texts(self, attempts: Sequence[Attempt], title: str = "base model") -> list[str]:
        """What the base model answers, greedily."""
        ids = [prompt_ids(self._model.tokenizer, attempt) for attempt in attempts]
        # Rows of a batch are padded to its longest.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        texts = [""] * len(ids)
        with progress_bar(self._console, f"{title} writes", len(ids)) as progress:
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                written = self._model.continuations(
                    [ids[i] for i in rows], max_new_tokens=self._max_new_tokens
                )
                for i, text in zip(rows, written, strict=True):
                    texts[i] = text
                progress(len(rows))
        return texts

    def verdicts(self, attempts: Sequence[Attempt], texts: Sequence[str]) -> list[Verdict]:
        """The judges' verdict on the answer to each attempt.

        Raises:
            CalibrationError: too few benign requests to tell degenerate text by.
        """
        return judge_texts(
            attempts, self._completions(attempts, texts), self.limits, self._model, self._console
        )

    def _completions(self, attempts: Sequence[Attempt], texts: Sequence[str]) -> list[Completion]:
        tokenizer = self._model.tokenizer
        completions = []
        for attempt, text in zip(attempts, texts, strict=True):
            prompt = prompt_ids(tokenizer, attempt)
            answer = tokenizer(text, add_special_tokens=False).input_ids if text else []
            rendered = Rendered(ids=(*prompt, *answer), num_prompt_tokens=len(prompt))
            completions.append(Completion(rendered, text, finished=True))
        return completions
