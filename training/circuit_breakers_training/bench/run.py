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
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from circuit_breakers_training.bench.arms import OURS, PUBLISHED, make_loop
from circuit_breakers_training.bench.loops import Loop, LossValues
from circuit_breakers_training.bench.peak import Peak, peak_memory
from circuit_breakers_training.bench.rows import BenchRows, RowFacts, bench_rows, row_facts
from circuit_breakers_training.config import Recipe

__all__ = ["ArmTimes", "BenchReport", "BenchSettings", "Exactness", "bench_training"]

_EXACT_ROWS = 2
"""Rows per kind of the float32 comparison, which shows numbers and not times."""


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
    """The same step by both loops from the same adapter."""

    precision: str
    rows_per_kind: int
    published: LossValues
    ours: LossValues
    loss_difference: float
    """Relative."""
    gradient_difference: float
    """Largest relative L2 difference of one tensor."""
    num_tensors: int
    total_gradient_difference: float
    """Relative L2 difference of all tensors as one vector."""


@dataclass(frozen=True, kw_only=True)
class ArmTimes:
    """Steps of one arm and of ours on the same rows, in seconds."""

    arm: str
    arm_s: tuple[float, ...]
    ours_s: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Times of the arm over ours, pair by pair; above 1, ours is faster."""
        return tuple(a / b for a, b in zip(self.arm_s, self.ours_s, strict=True))


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        total = 2 + len(settings.arms) * settings.num_pairs + len(memory_arms)
        task = progress.add_task("exactness", total=total)

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        for precision, rows_per_kind in (
            ("fp32", min(_EXACT_ROWS, settings.rows_per_kind)),
            (recipe.precision, settings.rows_per_kind),
        ):
            exact = recipe.model_copy(update={"precision": precision})
            report.exactness.append(_compared(exact, model_dir, device, rows_per_kind))
            advance("exactness")
        ours = make_loop(OURS, recipe, model_dir, device)
        ours.step(steps[0], recipe.steps // 2)
        for name in settings.arms:
            progress.update(task, description=name)
            arm = make_loop(name, recipe, model_dir, device)
            arm.step(steps[0], recipe.steps // 2)
            times = ArmTimes(arm=name, arm_s=(), ours_s=())
            for i, rows in enumerate(steps[1:]):
                times = _with_pair(times, arm, ours, rows, recipe.steps // 2, arm_first=i % 2 == 1)
                advance(name)
            report.times.append(times)
            progress.console.print(
                f"{name}: {statistics.median(times.ratios):.3f} times ours", highlight=False
            )
            del arm
            gc.collect()
        del ours
        gc.collect()
        for name in memory_arms:
            progress.update(task, description=f"memory of {name}")
            report.peaks.append(peak_memory(name, recipe, model_dir, settings.rows_per_kind))
            advance(f"memory of {name}")
    return report


def _with_pair(
    times: ArmTimes, arm: Loop, ours: Loop, rows: BenchRows, step: int, *, arm_first: bool
) -> ArmTimes:
    """`times` with one more pair of neighbouring steps."""
    loops = (arm, ours) if arm_first else (ours, arm)
    seconds = {}
    for loop in loops:
        gc.collect()
        seconds[loop] = loop.step(rows, step)
    return ArmTimes(
        arm=times.arm,
        arm_s=(*times.arm_s, seconds[arm]),
        ours_s=(*times.ours_s, seconds[ours]),
    )


def _compared(
    recipe: Recipe, model_dir: Path, device: torch.device, rows_per_kind: int
) -> Exactness:
    """One step of both loops, without dropout, half-way through the schedule."""
    lora = recipe.lora.model_copy(update={"dropout": 0.0})
    recipe = recipe.model_copy(update={"lora": lora})
    (rows,) = bench_rows(recipe, model_dir, rows_per_kind=rows_per_kind, num_steps=1)
    losses: dict[str, LossValues] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for name in (PUBLISHED, OURS):
        loop = make_loop(name, recipe, model_dir, device)
        losses[name] = loop.backward(rows, recipe.steps // 2)
        gradients[name] = {
            n: p.grad.detach().cpu() for n, p in loop.parameters.items() if p.grad is not None
        }
        del loop
        gc.collect()
    expected = gradients[PUBLISHED]
    assert gradients[OURS].keys() == expected.keys()
    errors = {n: gradients[OURS][n] - expected[n] for n in expected}
    return Exactness(
        precision=recipe.precision,
        rows_per_kind=rows_per_kind,
        published=losses[PUBLISHED],
        ours=losses[OURS],
        loss_difference=abs(losses[OURS].loss / losses[PUBLISHED].loss - 1),
        gradient_difference=max((errors[n].norm() / expected[n].norm()).item() for n in expected),
        num_tensors=len(expected),
        total_gradient_difference=(_norm(errors.values()) / _norm(expected.values())).item(),
    )


def _norm(tensors: Any) -> torch.Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def _machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines: Sequence[str] = info.read_text("utf-8").splitlines() if info.is_file() else ()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "circuit-breakers")},
    }
