"""All guards on one dataset, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from circuit_breakers.artifact import Breaker, Calibration, load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.evaluation.held_out import check_held_out
from circuit_breakers_training.evaluation.prompts import dataset_prompts
from circuit_breakers_training.evaluation.rates import rate
from circuit_breakers_training.evaluation.results import environment
from circuit_breakers_training.peers.cases import Case, Cases, Way, gather_cases, look_points
from circuit_breakers_training.peers.figures import (
    Looks,
    Row,
    Threshold,
    calibrated,
    cpu_ms,
    figures,
    one_thread,
)
from circuit_breakers_training.peers.model_guards import (
    ModelAsJudge,
    probe_cost,
    probe_looks,
    written_answers,
)
from circuit_breakers_training.peers.settings import GuardsSettings
from circuit_breakers_training.peers.text_guards import TEXT_GUARDS, Score, TextGuard
from circuit_breakers_training.probe.evaluate import trip_rate
from circuit_breakers_training.render import load_tokenizer
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["GuardsReport", "bench_guards"]

_EVERY: Final = 16
"""Answer tokens between two looks of a text guard."""
_MAX_LENGTH: Final = 1024
_ALL: Final = 1 << 30
_SEES: Final[dict[Way, str]] = {
    "prompt": "prompt",
    "whole": "prompt and answer, once at the end",
    "growing": f"prompt and answer, every {_EVERY} tokens",
}
_IN_FORWARD: Final = "every token, inside of the forward"
_JUDGE: Final = "base model as judge"
_BASE: Final = "no guard: the base model"
_ADAPTER: Final = "ours: adapter only"
_WRITTEN: Final = "nothing: it changes what is written"


@dataclass(frozen=True, kw_only=True)
class GuardsReport:
    """What was measured, and on what."""

    rows: tuple[Row, ...]
    breaker: str
    digest: str
    model: str
    target_fpr: float
    confidence: float
    data_sha256: dict[str, str]
    same_data: bool
    """The breaker was made from this very dataset."""
    num_cases: dict[str, int]
    """By split; of the calibration split, benign ones."""
    limit: int | None
    started: datetime
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What every guard is given."""

    settings: GuardsSettings
    breaker: Breaker
    resolved: ResolvedModel
    dataset: Dataset
    cases: Cases
    promise: Calibration
    """What the artifact promises, and every guard calibrated here has to."""
    console: Console | None


def bench_guards(settings: GuardsSettings, console: Console | None = None) -> GuardsReport:
    """The figures of every guard.

    Raises:
        ArtifactError, BreakerMismatchError: the breaker is broken, or of another model.
        DataError: the dataset is broken, a split lacks a label, or the breaker was made from
            prompts of the test split.
        CalibrationError: too few benign conversations for the artifact's promise.
        EvaluationError: a score is not finite.
    """
    started = datetime.now(UTC)
    breaker = load_breaker(settings.artifact)
    resolved = resolve_model(settings.model or breaker.manifest.base_model.id)
    breaker.check_fits(resolved.spec())
    dataset = load_dataset(settings.data)
    check_held_out(
        breaker, dataset, {"test": [row.prompt for row in dataset.test]}, allow_unknown=False
    )
    promise = breaker.manifest.probes[0].calibration
    merged_dir = merged_checkpoint(resolved, breaker)
    cases = gather_cases(
        dataset,
        load_tokenizer(merged_dir, "model"),
        max_length=min(_MAX_LENGTH, resolved.max_position_embeddings // 2),
        target_fpr=promise.target_fpr,
        confidence=promise.confidence,
        limit=settings.limit,
    )
    bench = _Bench(
        settings=settings,
        breaker=breaker,
        resolved=resolved,
        dataset=dataset,
        cases=cases,
        promise=promise,
        console=console,
    )
    with one_thread():
        rows = [row for make in _makers(bench, merged_dir) for row in make()]
    return GuardsReport(
        rows=tuple(rows),
        breaker=breaker.manifest.name,
        digest=breaker.digest,
        model=breaker.manifest.base_model.id,
        target_fpr=promise.target_fpr,
        confidence=promise.confidence,
        data_sha256=dataset.digests,
        same_data=dataset.digests == breaker.manifest.data_sha256,
        num_cases={
            "train": len(cases.train),
            "selection": len(cases.selection),
            "calibration": len(cases.calibration),
            "test harmful": sum(case.harmful for case in cases.test),
            "test benign": sum(not case.harmful for case in cases.test),
        },
        limit=settings.limit,
        started=started,
        environment=environment("transformers"),
    )


def _makers(bench: _Bench, merged_dir: Path) -> Iterator[Callable[[], list[Row]]]:
    """What makes the rows of each guard, in the order of the report."""

    def unless_skipped(
        name: str, label: str, sees: str, make: Callable[..., list[Row]], *arguments: Any
    ) -> Callable[[], list[Row]]:
        if name in bench.settings.skip:
            return lambda: [Row(name=label, sees=sees, not_run="named by --skip")]
        return partial(make, bench, *arguments)

    for name, guard in TEXT_GUARDS.items():
        yield unless_skipped(name, guard.label, _SEES[guard.ways[0]], _text_rows, guard)
    yield unless_skipped("judge", _JUDGE, _SEES["whole"], _judge_rows)
    yield unless_skipped("adapter", _ADAPTER, _WRITTEN, _written_rows, merged_dir)
    for name, label, folder in (
        ("probe", "ours: probe only", bench.resolved.path),
        ("both", "ours: adapter and probe", merged_dir),
    ):
        yield unless_skipped(name, label, _IN_FORWARD, _probe_rows, label, folder)


def _text_rows(bench: _Bench, guard: TextGuard) -> list[Row]:
    if guard.missing:
        return [Row(name=guard.label, sees=_SEES[guard.ways[0]], not_run=guard.missing)]
    fitted: dict[bool, Score] = {}
    rows = []
    for way in guard.ways:
        # The growing answer is read by what was fitted on whole ones.
        answers = way != "prompt"
        if answers not in fitted:
            fitted[answers] = guard.fit(bench.cases.train, bench.cases.selection, way)
        rows.append(_text_row(bench, guard, way, fitted[answers]))
    return rows


def _text_row(bench: _Bench, guard: TextGuard, way: Way, score: Score) -> Row:
    def look(case: Case) -> Looks:
        points = look_points(case, way, _EVERY)
        scores = [score([case.text(point)]) for point in points]
        return Looks(np.concatenate(scores), np.array(points))

    return _looking_row(bench, guard.label, _SEES[way], look)


def _judge_rows(bench: _Bench) -> list[Row]:
    note = "logit of yes less that of no after one question: one more forward a request"
    judge = ModelAsJudge(bench.resolved.path, bench.breaker.chat_template)
    return [_looking_row(bench, _JUDGE, _SEES["whole"], judge, notes=(note,))]


def _looking_row(
    bench: _Bench, label: str, sees: str, look: Callable[[Case], Looks], **more: Any
) -> Row:
    """The row of a guard that is calibrated here, and looks at one conversation after another."""

    def looks(cases: Sequence[Case], split: str) -> list[Looks]:
        with progress_bar(bench.console, f"{label}, {sees}: {split}", len(cases)) as progress:
            found = []
            for case in cases:
                found.append(look(case))
                progress(1)
        return found

    threshold = calibrated(
        looks(bench.cases.calibration, "calibration"),
        bench.cases.calibration,
        target_fpr=bench.promise.target_fpr,
        confidence=bench.promise.confidence,
    )
    test = bench.cases.test
    cost_ms = cpu_ms(look, test)
    return figures(label, sees, looks(test, "test"), test, threshold, cost_ms=cost_ms, **more)


def _probe_rows(bench: _Bench, label: str, model_dir: Path) -> list[Row]:
    cases = bench.cases.test
    with progress_bar(bench.console, label, len(cases)) as progress:
        looks = probe_looks(bench.breaker, model_dir, cases, progress=progress)
    cost = probe_cost(bench.breaker, model_dir, cases)
    note = (
        "a score is how far the running score is above the artifact's own threshold; the cost is "
        f"that of scoring alone, as the forward runs anyway ({cost.forward_ms:.0f} ms up to the "
        "deepest probed block)"
    )
    threshold = Threshold(0.0, bench.promise.num_conversations, bench.promise.num_trips)
    return [
        figures(
            label,
            _IN_FORWARD,
            looks,
            cases,
            threshold,
            cost_ms=cost.probe_ms,
            notes=(note,),
        )
    ]


def _written_rows(bench: _Bench, merged_dir: Path) -> list[Row]:
    base, merged = bench.settings.model or bench.breaker.manifest.base_model.id, str(merged_dir)
    answers = written_answers(
        {_BASE: base, _ADAPTER: merged},
        base,
        dataset_prompts(bench.dataset),
        chat_template=bench.breaker.chat_template,
        limit=bench.settings.limit or _ALL,
        console=bench.console,
    )
    return [
        Row(
            name=label,
            sees=_WRITTEN,
            num_harmful=len(found.harmful),
            num_benign=len(found.benign),
            tpr=rate(found.harmful),
            benign=trip_rate(found.benign),
            cost_ms=0.0,
            notes=(
                "no detector, so no ROC, threshold or stop: counted are the requests of the test "
                "split whose answer is a refusal or degenerate, by the judges of evaluate; the "
                "adapter is merged into the weights and costs nothing",
            ),
        )
        for label, found in zip((_BASE, _ADAPTER), answers, strict=True)
    ]
