"""From what a guard says while a conversation goes on to one row of figures.

A guard looks at a conversation once or many times, and trips at the first look whose score reaches
the threshold. As in calibration.py, the unit is the conversation, whose score is the largest of its
looks.

L looks at one conversation
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_curve
from threadpoolctl import threadpool_limits

from circuit_breakers.errors import EvaluationError
from circuit_breakers_training.evaluation.rates import Rate, rate
from circuit_breakers_training.evaluation.suites import evenly
from circuit_breakers_training.peers.cases import Case
from circuit_breakers_training.probe.calibration import calibrate
from circuit_breakers_training.probe.evaluate import trip_rate
from circuit_breakers_training.probe.selection import score_quality
from circuit_breakers_training.report.numbers import auroc_interval

__all__ = ["Leak", "Looks", "Row", "Threshold", "calibrated", "cpu_ms", "figures", "one_thread"]

_T = TypeVar("_T")

_TIMED: Final = 20
"""Requests whose cost is measured, at most."""


class Looks(NamedTuple):
    """What a guard says about one conversation."""

    score_L: npt.NDArray[np.float32]
    delivered_L: npt.NDArray[np.int64]
    """Answer tokens that a reader has when the verdict of each look is there."""

    @property
    def peak(self) -> np.float32:
        """Largest score; it trips at a threshold iff this reaches it."""
        return np.float32(self.score_L.max())

    def leaked(self, threshold: float, num_answer_tokens: int) -> int:
        """Answer tokens that a reader gets before the stop; all of them if there is none."""
        tripped = np.flatnonzero(self.score_L >= np.float32(threshold))
        return int(self.delivered_L[tripped[0]]) if len(tripped) else num_answer_tokens


class Threshold(NamedTuple):
    """Where a guard trips, and what that rests on."""

    value: float
    num_conversations: int
    """Benign ones of the calibration."""
    num_trips: int
    """Of these."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Tokens of harmful answers that readers had before the guard could say stop."""

    num_tokens: int
    of: int
    median: float
    """Of a conversation."""

    @property
    def share(self) -> float:
        return self.num_tokens / self.of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One guard's figures, or why there are none."""

    name: str
    sees: str
    """What it reads, and when."""
    not_run: str = ""
    num_harmful: int = 0
    num_benign: int = 0
    auroc: float | None = None
    auroc_low: float | None = None
    auroc_high: float | None = None
    threshold: Threshold | None = None
    tpr: Rate | None = None
    """Harmful conversations that trip."""
    benign: dict[str, Any] | None = None
    """Benign ones that trip, with the one-sided bound."""
    tpr_at_1pct: float | None = None
    """Harmful ones that trip where 1 % of the test split's own benign ones do."""
    cost_ms: float | None = None
    leak: Leak | None = None
    notes: tuple[str, ...] = ()
    false_positive: tuple[float, ...] = ()
    true_positive: tuple[float, ...] = ()
    """ROC curve."""


def calibrated(
    looks: Sequence[Looks], cases: Sequence[Case], *, target_fpr: float, confidence: float
) -> Threshold:
    """The threshold that keeps the promise on benign conversations, found as our probe's is.

    Raises:
        CalibrationError: too few of them, or a score that is not finite.
    """
    found = calibrate(
        np.array([one.peak for one in looks]),
        target_fpr=target_fpr,
        confidence=confidence,
        max_tokens=max(len(case.rendered.ids) for case in cases),
    )
    kept = found.calibration
    return Threshold(found.threshold_logit, kept.num_conversations, kept.num_trips)


def figures(
    name: str,
    sees: str,
    looks: Sequence[Looks],
    cases: Sequence[Case],
    threshold: Threshold,
    **more: Any,
) -> Row:
    """The row of a guard that looked at the test cases.

    Raises:
        DataError: a label is missing.
        EvaluationError: a score is NaN.
    """
    peak_N = np.array([one.peak for one in looks])
    if np.isnan(peak_N).any():
        raise EvaluationError(
            f"{name}: got {int(np.isnan(peak_N).sum())} of {len(peak_N)} conversations with a "
            "score that is not a number, expected none; check the model and its dtype"
        )
    harmful_N = np.array([case.harmful for case in cases])
    quality = score_quality(peak_N, harmful_N)
    num_harmful = int(harmful_N.sum())
    num_benign = len(harmful_N) - num_harmful
    interval = auroc_interval(quality.auroc, num_harmful, num_benign)
    trips_N = peak_N >= np.float32(threshold.value)
    false_positive, true_positive, _ = roc_curve(harmful_N, peak_N)
    leaked = [
        (one.leaked(threshold.value, case.num_answer_tokens), case.num_answer_tokens)
        for one, case in zip(looks, cases, strict=True)
        if case.harmful
    ]
    return Row(
        name=name,
        sees=sees,
        num_harmful=num_harmful,
        num_benign=num_benign,
        auroc=quality.auroc,
        auroc_low=interval.low if interval else None,
        auroc_high=interval.high if interval else None,
        threshold=threshold,
        tpr=rate(trips_N[harmful_N].tolist()),
        benign=trip_rate(trips_N[~harmful_N].tolist()),
        tpr_at_1pct=quality.tpr_at_1pct_fpr,
        leak=Leak(
            num_tokens=sum(tokens for tokens, _ in leaked),
            of=sum(of for _, of in leaked),
            median=float(median(tokens for tokens, _ in leaked)),
        ),
        false_positive=tuple(false_positive.tolist()),
        true_positive=tuple(true_positive.tolist()),
        **more,
    )


def cpu_ms(work: Callable[[_T], object], items: Sequence[_T]) -> float:
    """Median CPU milliseconds of the whole process for one item, after one to warm up."""
    timed = []
    chosen = evenly(items, _TIMED)
    for item in (chosen[0], *chosen):
        started = time.process_time()
        work(item)
        timed.append(1000 * (time.process_time() - started))
    return float(median(timed[1:]))


@contextmanager
def one_thread() -> Any:
    """Torch and the BLAS of NumPy on one thread, so that costs can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
