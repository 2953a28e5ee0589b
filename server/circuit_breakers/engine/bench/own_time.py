"""The guard's own time a step, by timers around its parts; in a pass of its own, as they cost too.

worker: the probe op of each probed block, blanking the rows, bringing them to the host
scheduler: taking the rows in, verdict, release
delivery: attaching the scores, and taking them off again in the output processor
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from statistics import fmean
from typing import Any

from circuit_breakers.engine import delivery, probes, releases
from circuit_breakers.engine.bench.arms import GuardSwitch
from circuit_breakers.engine.bench.blocks import Block, Workload

__all__ = ["OwnTime", "OwnTimeRow", "own_time"]

_PARTS = {
    "worker": ("probe_op", "blank_rows", "copy_rows", "rows_to_host"),
    "scheduler": ("take_rows", "judge", "release"),
    "delivery": ("attach", "extend"),
}


@dataclass(frozen=True, kw_only=True)
class OwnTime:
    """Means over the steps of one kind in one block, in seconds a step."""

    prefill: bool
    num_steps: int
    step_s: float
    """The whole step, timers included."""
    part_s: dict[str, float]
    """By part; a part that ran inside another one is counted once, as itself."""
    side_s: dict[str, float]
    """Sums of the parts: worker, scheduler, delivery."""
    op_in_graph: bool
    """The probe op is part of a compiled graph: its time cannot be told, and is left out."""


@dataclass(frozen=True, kw_only=True)
class OwnTimeRow:
    """The guard's own time in one arm."""

    arm: str
    workload: Workload
    batch: int
    times: list[OwnTime]
    """Prefill steps, decode steps."""


class _Clock:
    def __init__(self) -> None:
        self.step_s: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def timed(self, part: str, function: Callable[..., Any], inner: str = "") -> Callable[..., Any]:
        """`function`, its time added to `part`, without what it spends in `inner`."""
        step_s = self.step_s

        @wraps(function)
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            inner_s, began_s = step_s[inner], time.perf_counter()
            result = function(*args, **kwargs)
            step_s[part] += time.perf_counter() - began_s - (step_s[inner] - inner_s)
            return result

        return timed_function

    def end_step(self) -> None:
        self.steps.append(dict(self.step_s))
        self.step_s.clear()


def own_time(
    switch: GuardSwitch, engine: Any, run: Callable[[], Block], *, compiled: bool
) -> list[OwnTime]:
    """Runs one block under timers; what the guard spent in its prefill and its decode steps."""
    clock = _Clock()
    with ExitStack() as stack:
        for owner, name, part, inner in (
            (switch.probes, "begin_step", "blank_rows", ""),
            (switch.probes, "take_rows", "copy_rows", ""),
            (probes.PendingRows, "get", "rows_to_host", ""),
            (switch.guard, "take_rows", "take_rows", ""),
            (switch.guard, "judge", "judge", ""),
            (switch.guard, "release", "release", "attach"),
            (releases, "attach_scores", "attach", ""),
            (delivery.TokenScores, "extend", "extend", ""),
        ):
            timed = clock.timed(part, getattr(owner, name), inner)
            stack.enter_context(_replaced(owner, name, timed))
        if not compiled:
            stack.enter_context(_timed_hooks(switch.probes, clock))
        step = engine.step

        def counted_step() -> Any:
            outputs = step()
            clock.end_step()
            return outputs

        stack.enter_context(_replaced(engine, "step", counted_step))
        block = run()
    return [
        _mean(block, clock.steps, prefill, compiled)
        for prefill in (True, False)
        if any(s.prefill == prefill and s.num_tokens for s in block.steps)
    ]


def _mean(block: Block, steps: list[dict[str, float]], prefill: bool, compiled: bool) -> OwnTime:
    chosen = [
        (step, part_s)
        for step, part_s in zip(block.steps, steps, strict=True)
        if step.prefill == prefill and step.num_tokens
    ]
    names = [name for part_names in _PARTS.values() for name in part_names]
    part_s = {name: fmean(p.get(name, 0.0) for _, p in chosen) for name in names}
    return OwnTime(
        prefill=prefill,
        num_steps=len(chosen),
        step_s=fmean(step.time_s for step, _ in chosen),
        part_s=part_s,
        side_s={side: sum(part_s[name] for name in parts) for side, parts in _PARTS.items()},
        op_in_graph=compiled,
    )


@contextmanager
def _timed_hooks(live: probes.WorkerProbes, clock: _Clock) -> Iterator[None]:
    hooks = live._hooks
    live.enable(False)
    live._hooks = [(block, clock.timed("probe_op", hook)) for block, hook in hooks]
    live.enable(True)
    try:
        yield
    finally:
        live.enable(False)
        live._hooks = hooks
        live.enable(True)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside, and what it was afterwards."""
    had_own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
