"""Runs a benchmark: loops in turn on the same rows, then peak memory process by process.

exactness:  published | ours        one step each from equal adapters, float32 and the recipe's
time:       every arm | ours        one process, A B B A
memory:     every arm, ours         fresh processes
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from circuit_breakers.hardware import pick_device
from circuit_breakers_training.bench.arms import OURS, PUBLISHED, make_loop
from circuit_breakers_training.bench.loops import Loop, LossValues, StepTime
from circuit_breakers_training.bench.peak import Peak, peak_memory
from circuit_breakers_training.bench.rows import BenchRows, RowFacts, bench_rows, row_facts
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["ArmTimes", "BenchReport", "BenchSettings", "Exactness", "bench_training"]

_EXACT_ROWS = 2
"""Rows per kind of the comparison of losses, which needs no more."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure."""

    rows_per_kind: int = 8
    num_pairs: int = 5
    """Neighbouring steps of each comparison."""
    arms: tuple[str, ...] = (PUBLISHED,)
    memory: bool = True
    """Peak memory, too: of each arm and of ours."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """One step from the same adapter, compared with the published loop's in float32."""

    arm: str
    precision: str
    rows_per_kind: int
    losses: LossValues
    loss_difference: float
    """Relative."""
    gradient_difference: float
    """Relative L2 difference of all gradients as one vector."""
    worst_tensor_difference: float
    """The largest of one tensor."""
    num_tensors: int


@dataclass(frozen=True, kw_only=True)
class ArmTimes:
    """Neighbouring steps of one arm and of ours on the same rows."""

    arm: str
    pairs: tuple[tuple[StepTime, StepTime], ...]
    """The arm's step and ours."""

    @property
    def wall_ratios(self) -> tuple[float, ...]:
        """Times of the arm over ours, pair by pair; above 1, ours is faster."""
        return tuple(arm.wall_s / ours.wall_s for arm, ours in self.pairs)

    @property
    def cpu_ratios(self) -> tuple[float, ...]:
        return tuple(arm.cpu_s / ours.cpu_s for arm, ours in self.pairs)


@dataclass(kw_only=True)
class BenchReport:
    """All that was measured."""

    command: str
    machine: dict[str, Any]
    model: str
    recipe: dict[str, Any]
    settings: BenchSettings
    rows: RowFacts
    exactness: list[Exactness] = field(default_factory=list)
    times: list[ArmTimes] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)


def bench_training(
    recipe: Recipe, model_dir: Path, settings: BenchSettings, console: Console | None = None
) -> BenchReport:
    """Runs the benchmark, on a GPU where there is one.

    Args:
        console: where progress is shown.
    Raises:
        CircuitBreakersError: a loop cannot be made or run.
    """
    device = torch.device(pick_device())
    steps = bench_rows(
        recipe,
        model_dir,
        rows_per_kind=settings.rows_per_kind,
        num_steps=settings.num_pairs + 1,
    )
    report = BenchReport(
        command=shlex.join(["circuit-breakers", *sys.argv[1:]]),
        machine=_machine(device),
        model=recipe.model,
        recipe=recipe.model_dump(mode="json"),
        settings=settings,
        rows=row_facts(steps),
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console or Console(quiet=True),
    ) as progress:
        memory_arms = (*settings.arms, OURS) if settings.memory else ()
        total = 1 + len(settings.arms) * settings.num_pairs + len(memory_arms)
        task = progress.add_task("exactness", total=total)

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        report.exactness.extend(_compared(recipe, model_dir, device, settings))
        advance("exactness")
        ours = make_loop(OURS, recipe, model_dir, device)
        ours.step(steps[0], recipe.steps // 2)
        for name in settings.arms:
            progress.update(task, description=name)
            arm = make_loop(name, recipe, model_dir, device)
            arm.step(steps[0], recipe.steps // 2)
            pairs = []
            for i, rows in enumerate(steps[1:]):
                times = _pair(arm, ours, rows, recipe.steps // 2, arm_first=i % 2 == 1)
                pairs.append(times)
                advance(name)
                progress.console.print(
                    f"{name} {times[0].wall_s:.2f} s, ours {times[1].wall_s:.2f} s",
                    highlight=False,
                )
            report.times.append(ArmTimes(arm=name, pairs=tuple(pairs)))
            del arm
            gc.collect()
        del ours
        gc.collect()
        for name in memory_arms:
            progress.update(task, description=f"memory of {name}")
            report.peaks.append(peak_memory(name, recipe, model_dir, settings.rows_per_kind))
            advance(f"memory of {name}")
    return report


def _pair(
    arm: Loop, ours: Loop, rows: BenchRows, step: int, *, arm_first: bool
) -> tuple[StepTime, StepTime]:
    """Neighbouring steps of both on the same rows."""
    times = {}
    for loop in (arm, ours) if arm_first else (ours, arm):
        gc.collect()
        times[loop] = loop.step(rows, step)
    return times[arm], times[ours]


def _compared(
    recipe: Recipe, model_dir: Path, device: torch.device, settings: BenchSettings
) -> Iterator[Exactness]:
    """One step of both loops in float32 and in the recipe's precision, half-way and undisturbed."""
    lora = recipe.lora.model_copy(update={"dropout": 0.0})
    rows_per_kind = min(_EXACT_ROWS, settings.rows_per_kind)
    (rows,) = bench_rows(recipe, model_dir, rows_per_kind=rows_per_kind, num_steps=1)
    truth: tuple[float, dict[str, Tensor]] | None = None
    for precision in dict.fromkeys(("fp32", recipe.precision)):
        exact = recipe.model_copy(update={"precision": precision, "lora": lora})
        for name in (PUBLISHED, OURS):
            loop = make_loop(name, exact, model_dir, device)
            losses = loop.backward(rows, recipe.steps // 2)
            gradients = {n: p.grad.cpu() for n, p in loop.parameters.items() if p.grad is not None}
            del loop
            gc.collect()
            truth = truth or (losses.loss, gradients)
            loss, expected = truth
            assert gradients.keys() == expected.keys()
            errors = {n: gradients[n] - expected[n] for n in expected}
            yield Exactness(
                arm=name,
                precision=precision,
                rows_per_kind=rows_per_kind,
                losses=losses,
                loss_difference=abs(losses.loss / loss - 1),
                gradient_difference=_norm(errors) / _norm(expected),
                worst_tensor_difference=max(
                    (errors[n].norm() / expected[n].norm()).item() for n in expected
                ),
                num_tensors=len(expected),
            )


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors.values()]).norm().item()


def _machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines: Sequence[str] = info.read_text("utf-8").splitlines() if info.is_file() else ()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "circuit-breakers")},
    }
