"""From a breaker and suites to results on disk.

prompts ─ attempts ─ held out? ─ base and adapted model write ─ guard ─ judges ─┐
                                                  perplexity, lm-eval tasks ────┴─ results
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import EvaluationError
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.data.generate import pick_backend
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.evaluation.capability import (
    benign_answers,
    benign_perplexity,
    run_lm_eval,
)
from circuit_breakers_training.evaluation.completions import (
    Completion,
    Sampling,
    render_attempts,
    write_completions,
)
from circuit_breakers_training.evaluation.degeneration import DegenerateLimits, check_num_texts
from circuit_breakers_training.evaluation.guarded import guard_completions
from circuit_breakers_training.evaluation.held_out import check_held_out
from circuit_breakers_training.evaluation.outcomes import Outcome, row_json, summarise
from circuit_breakers_training.evaluation.prompts import gather_prompts
from circuit_breakers_training.evaluation.report import result_files
from circuit_breakers_training.evaluation.results import check_out, environment, write_results
from circuit_breakers_training.evaluation.settings import EvaluationSettings
from circuit_breakers_training.evaluation.sides import Written, judge_sides, reference_limits
from circuit_breakers_training.evaluation.suites import (
    SUITES,
    Attempt,
    build_attempts,
    reference_attempts,
)
from circuit_breakers_training.fluency import LanguageModel
from circuit_breakers_training.render import TemplateSource
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["evaluate_breaker"]

RESULTS_VERSION = 1

_PERPLEXITY_TOKENS = 1024


class _Models(NamedTuple):
    """The two checkpoints that are compared."""

    resolved: ResolvedModel
    merged_dir: Path
    chat_template: TemplateSource

    @property
    def paths(self) -> dict[str, Path]:
        return {"base": self.resolved.path, "adapter": self.merged_dir}


class _Judged(NamedTuple):
    outcomes: list[Outcome]
    limits: DegenerateLimits | None


def evaluate_breaker(
    settings: EvaluationSettings, *, console: Console | None = None
) -> dict[str, Any]:
    """Evaluates a breaker beside its base model; results are written to `settings.out`.

    Returns what results.json holds.

    Raises:
        ConfigError: `out` is taken, or a setting does not fit the model.
        ArtifactError, BreakerMismatchError: the breaker is broken, or of another model.
        DataError: prompts cannot be read, a suite is empty, or was seen in training.
        CalibrationError: too few benign answers to tell degenerate text by.
        EvaluationError: a token has no score; or a suite failed in part or in whole, and then the
            results are written all the same.
    """
    # What can be refused is refused before minutes are spent.
    check_out(settings.out, overwrite=settings.overwrite)
    backend = pick_backend(settings.backend)
    breaker = load_breaker(settings.artifact)
    resolved = resolve_model(settings.model or breaker.manifest.base_model.id)
    breaker.check_fits(resolved.spec())
    dataset = load_dataset(settings.data) if settings.data is not None else None
    prompts = gather_prompts(dataset, settings.prompt_files)
    attempts = build_attempts(
        settings.suites, prompts, limit=settings.limit, per_prompt=settings.per_prompt
    )
    answers = (
        benign_answers(dataset, limit=settings.limit) if "capability" in settings.suites else []
    )
    overlap = check_held_out(
        breaker,
        dataset,
        _requests(attempts, answers),
        allow_unknown=settings.allow_unknown_overlap,
    )
    reference = reference_attempts(prompts) if attempts else []
    if attempts:
        check_num_texts(len(reference), 0, share=settings.degenerate_share)

    models = _Models(resolved, merged_checkpoint(resolved, breaker), breaker.chat_template)
    judged = _judge_attempts(settings, breaker, models, attempts, reference, console)
    suites = _summaries(settings, breaker, judged.outcomes, attempts)
    failures = _row_failures(judged.outcomes)
    for name in settings.suites:
        if SUITES[name].kind == "capability":
            try:
                suites[name] = _capability(name, settings, models, answers, console)
            except EvaluationError as error:
                failures[name] = [str(error)]
    results: dict[str, Any] = {
        "schema_version": RESULTS_VERSION,
        "breaker": {"name": breaker.manifest.name, "digest": breaker.digest},
        "model": resolved.spec().model_dump(mode="json"),
        "settings": settings.to_json(),
        "overlap_with_training": overlap,
        "data_sha256": None if dataset is None else dataset.digests,
        "degenerate_limits": None if judged.limits is None else dict(vars(judged.limits)),
        "suites": suites,
        "failures": failures,
        "environment": environment(backend),
        "rows": [row_json(o, keep_texts=settings.keep_texts) for o in judged.outcomes],
    }
    assert len(results["rows"]) == len(attempts)
    write_results(settings.out, result_files(results, judged.outcomes, breaker.manifest.probes))
    if failures:
        reasons = [f"suite {name!r}: {why}" for name, all_ in failures.items() for why in all_]
        raise EvaluationError(
            f"{'; '.join(reasons)}; expected every suite whole; the rest is in {settings.out}"
        )
    return results


def _judge_attempts(
    settings: EvaluationSettings,
    breaker: Breaker,
    models: _Models,
    attempts: Sequence[Attempt],
    reference: Sequence[Attempt],
    console: Console | None,
) -> _Judged:
    """All attempts, written by both models, guarded and judged."""
    if not attempts:
        return _Judged([], None)
    resolved = models.resolved
    ids, longest = render_attempts(
        resolved,
        [*attempts, *reference],
        chat_template=models.chat_template,
        max_new_tokens=settings.max_new_tokens,
    )
    sampling = Sampling(
        settings.max_new_tokens,
        settings.temperature,
        settings.seed,
        pick_backend(settings.backend),
    )

    def write(path: Path, wanted: Sequence[tuple[int, ...]], title: str) -> list[Completion]:
        return write_completions(
            path,
            resolved.name,
            wanted,
            sampling,
            chat_template=models.chat_template,
            max_model_len=longest,
            title=title,
        )

    base = write(resolved.path, ids, "base model writes")
    adapted = write(models.merged_dir, ids[: len(attempts)], "adapted model writes")
    with progress_bar(console, "probes read", len(adapted)) as progress:
        guarded = guard_completions(breaker, models.merged_dir, adapted, progress=progress)
    base_model = LanguageModel(resolved.path)
    limits = reference_limits(
        base_model, base[len(attempts) :], share=settings.degenerate_share, console=console
    )
    written = Written(attempts, base[: len(attempts)], adapted, guarded)
    return _Judged(judge_sides(written, limits, settings, base_model, console), limits)


def _requests(attempts: Sequence[Attempt], answers: Sequence[Conversation]) -> dict[str, list[str]]:
    """What is asked, by suite."""
    requests: dict[str, list[str]] = defaultdict(list)
    for attempt in attempts:
        requests[attempt.suite].append(attempt.prompt.request)
    for answer in answers:
        requests["capability"].append(answer.prompt)
    return requests


def _summaries(
    settings: EvaluationSettings,
    breaker: Breaker,
    outcomes: Sequence[Outcome],
    attempts: Sequence[Attempt],
) -> dict[str, Any]:
    suites: dict[str, Any] = {}
    for name in settings.suites:
        if SUITES[name].kind == "capability":
            continue
        own = [o for o in outcomes if o.attempt.suite == name]
        assert len(own) == sum(a.suite == name for a in attempts)
        suites[name] = summarise(name, own, breaker.manifest.probes)
    return suites


def _row_failures(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Why suites are not whole: texts that could not be judged, counted."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes:
        found = counts[outcome.attempt.suite]
        sides = (outcome.base, outcome.adapter, outcome.adapter_and_probe)
        found["texts that the LLM judge did not answer yes or no to"] += sum(
            side.llm == "failed" for side in sides
        )
        found["texts whose loss under the base model is not finite"] += sum(
            side.verdict.fluency.nats_per_token is not None
            and not math.isfinite(side.verdict.fluency.nats_per_token)
            for side in sides
        )
    return {
        suite: [f"got {count} {what}" for what, count in found.items() if count]
        for suite, found in counts.items()
        if any(found.values())
    }


def _capability(
    name: str,
    settings: EvaluationSettings,
    models: _Models,
    answers: Sequence[Conversation],
    console: Console | None,
) -> dict[str, Any]:
    about = {"kind": SUITES[name].kind, "about": SUITES[name].about}
    if name == "lm-eval":
        tasks = run_lm_eval(
            models.paths, settings.lm_eval_tasks, limit=settings.limit, seed=settings.seed
        )
        return {**about, "limit": settings.limit, "tasks": tasks}
    measured = benign_perplexity(
        models.paths,
        answers,
        chat_template=models.chat_template,
        max_length=min(_PERPLEXITY_TOKENS, models.resolved.max_position_embeddings),
        console=console,
    )
    return {**about, **measured}
