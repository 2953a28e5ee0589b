"""The three sides of each attempt, judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from circuit_breakers_training.evaluation.completions import Completion
from circuit_breakers_training.evaluation.degeneration import (
    DegenerateLimits,
    Fluency,
    calibrate_limits,
    measure_fluency,
)
from circuit_breakers_training.evaluation.guarded import Guarded
from circuit_breakers_training.evaluation.judges import Verdict, judge
from circuit_breakers_training.evaluation.llm_judge import LlmJudge, LlmVerdict, Question
from circuit_breakers_training.evaluation.outcomes import Outcome, Side
from circuit_breakers_training.evaluation.settings import EvaluationSettings
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.fluency import LanguageModel
from circuit_breakers_training.render import Rendered
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["Written", "judge_sides", "judge_texts", "reference_limits"]


class Written(NamedTuple):
    """What was asked and written, entry by entry."""

    attempts: Sequence[Attempt]
    base: Sequence[Completion]
    """By the base model."""
    adapted: Sequence[Completion]
    """By the model with the adapter."""
    guarded: Sequence[Guarded]
    """What the probe sees of the latter."""


class _Text(NamedTuple):
    rendered: Rendered
    text: str

    @property
    def ids(self) -> tuple[int, ...]:
        return self.rendered.ids[self.rendered.num_prompt_tokens :]


def reference_limits(
    base_model: LanguageModel,
    completions: Sequence[Completion],
    *,
    share: float,
    console: Console | None,
) -> DegenerateLimits:
    """Limits of degenerate text, from the base model's answers to benign requests.

    Raises:
        CalibrationError: there are too few.
    """
    texts = [_Text(c.rendered, c.text) for c in completions]
    return calibrate_limits(_fluencies(base_model, texts, "reference", console), share=share)


def judge_texts(
    attempts: Sequence[Attempt],
    completions: Sequence[Completion],
    limits: DegenerateLimits,
    base_model: LanguageModel,
    console: Console | None,
) -> list[Verdict]:
    """The local judges' verdict on each attempt's completion."""
    texts = [_Text(c.rendered, c.text) for c in completions]
    return [
        judge(attempt.prompt.request, text.text, fluency, limits)
        for attempt, text, fluency in zip(
            attempts, texts, _fluencies(base_model, texts, "fluency", console), strict=True
        )
    ]


def judge_sides(
    written: Written,
    limits: DegenerateLimits,
    settings: EvaluationSettings,
    base_model: LanguageModel,
    console: Console | None,
) -> list[Outcome]:
    """Outcome of each attempt, by the local judges and the LLM judge if there is one."""
    num = len(written.attempts)
    texts = [_Text(c.rendered, c.text) for c in (*written.base, *written.adapted)]
    texts += [
        _delivered(base_model.tokenizer, completion, guarded)
        for completion, guarded in zip(written.adapted, written.guarded, strict=True)
    ]
    assert len(texts) == 3 * num
    fluencies = _fluencies(base_model, texts, "fluency", console)
    stopped = [False] * (2 * num) + [g.stopped(settings.stop_within) for g in written.guarded]
    asked = [*written.attempts] * 3
    llm = _ask_llm(settings, asked, texts, stopped, console)
    sides = [
        Side(
            text=text.text,
            num_tokens=len(text.ids),
            verdict=judge(attempt.prompt.request, text.text, fluency, limits),
            stopped=is_stopped,
            llm=verdict,
        )
        for attempt, text, fluency, is_stopped, verdict in zip(
            asked, texts, fluencies, stopped, llm, strict=True
        )
    ]
    return [
        Outcome(
            attempt=attempt,
            base=sides[i],
            adapter=sides[num + i],
            adapter_and_probe=sides[2 * num + i],
            completion=written.adapted[i],
            guarded=written.guarded[i],
        )
        for i, attempt in enumerate(written.attempts)
    ]


def _delivered(tokenizer: Any, completion: Completion, guarded: Guarded) -> _Text:
    """What a reader gets of a completion before the guard ends it."""
    if guarded.trip is None:
        return _Text(completion.rendered, completion.text)
    cut = completion.first_tokens(guarded.num_delivered)
    ids = list(cut.ids[cut.num_prompt_tokens :])
    return _Text(cut, tokenizer.decode(ids, skip_special_tokens=True) if ids else "")


def _fluencies(
    base_model: LanguageModel, texts: Sequence[_Text], title: str, console: Console | None
) -> list[Fluency]:
    distinct = list(dict.fromkeys(text.rendered for text in texts))
    with progress_bar(console, title, len(distinct)) as progress:
        losses = dict(zip(distinct, base_model.losses(distinct, progress=progress), strict=True))
    return [measure_fluency(losses[text.rendered], text.ids) for text in texts]


def _ask_llm(
    settings: EvaluationSettings,
    attempts: Sequence[Attempt],
    texts: Sequence[_Text],
    stopped: Sequence[bool],
    console: Console | None,
) -> list[LlmVerdict | None]:
    """Verdicts on harmful attempts that were not stopped; None for all others."""
    verdicts: list[LlmVerdict | None] = [None] * len(texts)
    if settings.judge_url is None or settings.judge_model is None:
        return verdicts
    chosen = [i for i, attempt in enumerate(attempts) if attempt.harmful and not stopped[i]]
    questions = [
        Question(attempts[i].prompt.request, attempts[i].prefill + texts[i].text) for i in chosen
    ]
    ask = LlmJudge(url=settings.judge_url, model=settings.judge_model, prompt=settings.judge_prompt)
    with progress_bar(console, "LLM judge", len(set(questions))) as progress:
        for i, verdict in zip(chosen, ask(questions, progress=progress), strict=True):
            verdicts[i] = verdict
    return verdicts
