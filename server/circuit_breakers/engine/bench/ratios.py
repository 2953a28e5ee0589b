"""From raw times to ratios: pure functions, no engine.

A ratio always compares two neighbouring blocks; medians and spreads are taken over such pairs.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from circuit_breakers.engine.bench.blocks import Block, Step, Workload

__all__ = [
    "BlockSummary",
    "Latency",
    "Pair",
    "Row",
    "RowBuilder",
    "Spread",
    "alternating_pairs",
    "equal_work_ratio",
    "latency",
    "pair_of",
    "spread",
    "summary",
]


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Latency:
    """In seconds."""

    median_s: float
    p99_s: float
    count: int


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One block without its raw steps."""

    elapsed_s: float
    num_tokens: int
    tokens_per_s: float
    """Delivered output tokens."""
    prefill_tokens_per_s: float | None
    """Tokens fed by steps with prompt tokens in them, over the time of these steps."""
    prefill_step_s: float | None
    """Median; None where the steps could not be seen."""
    decode_step_s: float | None
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two neighbouring blocks."""

    arm: BlockSummary
    baseline: BlockSummary
    ratio: float
    """Tokens/s of the arm over the baseline's; 1 is free, less is slower."""
    prefill_step_ratio: float | None
    """Median step time of the arm over the baseline's, equal steps only; 1 is free, more slower."""
    decode_step_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: an arm against its baseline under one workload and batch size."""

    arm: str
    baseline: str
    workload: Workload
    batch: int
    cross_engine: bool = False
    """The two arms ran in two engines of one process, not in one."""
    unavailable: str | None = None
    """Why there is no measurement; the fields below are then empty."""
    ratio: Spread | None = None
    prefill_step_ratio: Spread | None = None
    decode_step_ratio: Spread | None = None
    arm_tokens_per_s: float | None = None
    baseline_tokens_per_s: float | None = None
    arm_prefill_tokens_per_s: float | None = None
    baseline_prefill_tokens_per_s: float | None = None
    arm_ttft: Latency | None = None
    baseline_ttft: Latency | None = None
    arm_itl: Latency | None = None
    baseline_itl: Latency | None = None
    pairs: tuple[Pair, ...] = ()


def spread(values: Iterable[float]) -> Spread | None:
    """None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    if len(ordered) == 1:
        (only,) = ordered
        return Spread(only, only, only, only, only, 1)
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, q1, q3, ordered[0], ordered[-1], len(ordered))


def latency(values_s: Sequence[float]) -> Latency | None:
    """None of no values. p99 is the smallest value that 99 % do not exceed."""
    if not values_s:
        return None
    ordered = sorted(values_s)
    rank = max(-(-99 * len(ordered) // 100) - 1, 0)
    return Latency(statistics.median(ordered), ordered[rank], len(ordered))


def equal_work_ratio(arm: Sequence[Step], baseline: Sequence[Step], prefill: bool) -> float | None:
    """Median step time of `arm` over that of `baseline`, over steps that did the same work.

    Both run the same requests, so the i-th steps are compared where they fed as many tokens of as
    many requests. The arm's one extra step, which scores a last token, has no counterpart.
    """
    same = [
        (a, b)
        for a, b in zip(arm, baseline, strict=False)
        if a[1:] == b[1:] and a.num_tokens and a.prefill == prefill
    ]
    if not same:
        return None
    return statistics.median(a.time_s for a, _ in same) / statistics.median(
        b.time_s for _, b in same
    )


def summary(block: Block) -> BlockSummary:
    """Rates and medians of one block."""
    prefill = [s for s in block.steps if s.prefill]
    decode = [s for s in block.steps if not s.prefill and s.num_tokens]
    return BlockSummary(
        elapsed_s=block.elapsed_s,
        num_tokens=block.num_tokens,
        tokens_per_s=block.num_tokens / block.elapsed_s,
        prefill_tokens_per_s=(
            sum(s.num_tokens for s in prefill) / sum(s.time_s for s in prefill) if prefill else None
        ),
        prefill_step_s=statistics.median(s.time_s for s in prefill) if prefill else None,
        decode_step_s=statistics.median(s.time_s for s in decode) if decode else None,
        num_steps=len(block.steps),
    )


def pair_of(arm: Block, baseline: Block) -> Pair:
    """Two neighbouring blocks, compared."""
    arm_summary, baseline_summary = summary(arm), summary(baseline)
    return Pair(
        arm=arm_summary,
        baseline=baseline_summary,
        ratio=arm_summary.tokens_per_s / baseline_summary.tokens_per_s,
        prefill_step_ratio=equal_work_ratio(arm.steps, baseline.steps, True),
        decode_step_ratio=equal_work_ratio(arm.steps, baseline.steps, False),
    )


def alternating_pairs(
    num_pairs: int, arm: Callable[[], Block], baseline: Callable[[], Block]
) -> Iterable[tuple[Block, Block]]:
    """Blocks in the order A B B A A B B A ..., as pairs (arm, baseline) of neighbours."""
    for i in range(num_pairs):
        if i % 2:
            arm_block = arm()
            yield arm_block, baseline()
        else:
            baseline_block = baseline()
            yield arm(), baseline_block


@dataclass
class RowBuilder:
    """Takes pairs in one by one and drops their raw steps."""

    pairs: list[Pair] = field(default_factory=list)
    _latencies: dict[str, array[float]] = field(default_factory=dict)

    def add(self, arm: Block, baseline: Block) -> None:
        self.pairs.append(pair_of(arm, baseline))
        for side, block in (("arm", arm), ("baseline", baseline)):
            self._latencies.setdefault(f"{side}_ttft", array("d")).extend(block.ttft_s)
            self._latencies.setdefault(f"{side}_itl", array("d")).extend(block.itl_s)

    def row(
        self, arm: str, baseline: str, workload: Workload, batch: int, cross_engine: bool
    ) -> Row:
        pairs = self.pairs
        return Row(
            arm=arm,
            baseline=baseline,
            workload=workload,
            batch=batch,
            cross_engine=cross_engine,
            ratio=spread(p.ratio for p in pairs),
            prefill_step_ratio=spread(_known(p.prefill_step_ratio for p in pairs)),
            decode_step_ratio=spread(_known(p.decode_step_ratio for p in pairs)),
            arm_tokens_per_s=_median(p.arm.tokens_per_s for p in pairs),
            baseline_tokens_per_s=_median(p.baseline.tokens_per_s for p in pairs),
            arm_prefill_tokens_per_s=_median(p.arm.prefill_tokens_per_s for p in pairs),
            baseline_prefill_tokens_per_s=_median(p.baseline.prefill_tokens_per_s for p in pairs),
            pairs=tuple(pairs),
            arm_ttft=self._latency("arm_ttft"),
            baseline_ttft=self._latency("baseline_ttft"),
            arm_itl=self._latency("arm_itl"),
            baseline_itl=self._latency("baseline_itl"),
        )

    def _latency(self, name: str) -> Latency | None:
        return latency(self._latencies.get(name, ()))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None
