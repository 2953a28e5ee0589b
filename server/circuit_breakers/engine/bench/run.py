"""Runs a benchmark: engines one after another, arms in turn, everything shut down at the end.

merged engine:  plain | observe, enforce, probes-1, probes-N   one engine, guard switched
  + hidden-states engine, + guard-model engine                 two engines, blocks in turn
dynamic engine: plain | dynamic                                one engine, guard switched
start-up:       plain | guarded                                fresh interpreters
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.bench.alternatives import Alternative, GuardModel, HiddenStates
from circuit_breakers.engine.bench.arms import (
    PLAIN,
    GuardState,
    GuardSwitch,
    Run,
    breaker_with_probes,
    switched,
)
from circuit_breakers.engine.bench.blocks import BenchEngine, Block, Workload
from circuit_breakers.engine.bench.engines import BenchSettings, Engines, bench_environment
from circuit_breakers.engine.bench.footprint import Footprint, footprint
from circuit_breakers.engine.bench.machine import Machine, command_line, describe_machine
from circuit_breakers.engine.bench.own_time import OwnTimeRow, own_time
from circuit_breakers.engine.bench.progress import BenchProgress
from circuit_breakers.engine.bench.ratios import Row, RowBuilder, alternating_pairs
from circuit_breakers.engine.bench.startup import Startup, startup_times
from circuit_breakers.engine.config import ADAPTER_NAME
from circuit_breakers.guard.decision import Mode
from circuit_breakers.models import ResolvedModel

__all__ = ["BenchReport", "bench_serving"]

_WARM_UP_TOKENS = 8


@dataclass(kw_only=True)
class BenchReport:
    """All that was measured."""

    command: str
    machine: Machine
    model: str
    breaker: str
    breaker_digest: str
    settings: BenchSettings
    rows: list[Row] = field(default_factory=list)
    own_times: list[OwnTimeRow] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    startup: Startup | None = None


def bench_serving(
    model: ResolvedModel,
    breaker: Breaker,
    settings: BenchSettings,
    console: Console | None = None,
) -> BenchReport:
    """Runs the benchmark in this process.

    Args:
        console: where progress is shown.
    Raises:
        CircuitBreakersError: it cannot start, or the arms did not do what they should.
    """
    with ExitStack() as stack:
        stack.enter_context(bench_environment())
        report = BenchReport(
            command=command_line(),
            machine=describe_machine(),
            model=model.name,
            breaker=breaker.manifest.name,
            breaker_digest=breaker.digest,
            settings=settings,
        )
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="circuit-breakers-bench-")))
        progress = stack.enter_context(BenchProgress(console))
        _Bench(report, Engines(model, settings), breaker, scratch, progress).run()
    return report


class _Bench:
    def __init__(
        self,
        report: BenchReport,
        engines: Engines,
        breaker: Breaker,
        scratch: Path,
        progress: BenchProgress,
    ) -> None:
        self.report = report
        self.engines = engines
        self.breaker = breaker
        self.scratch = scratch
        self.progress = progress
        self.settings = report.settings

    def run(self) -> None:
        arms, settings = self.settings.arms, self.settings
        modes: tuple[Mode, ...] = ("observe", "enforce")
        states: dict[str, GuardState] = {m: GuardState(m) for m in modes if m in arms}
        counts = (1, settings.num_probes) if "probes" in arms else ()
        cross: list[str] = [a for a in ("hidden-states", "guard-model") if a in arms]
        num_rows = len(states) + len(counts) + len(cross) + ("dynamic" in arms)
        num_rows += bool(counts) and not settings.compiled
        num_configs = len(settings.workloads) * len(settings.batches)
        self.progress.expect(num_rows * num_configs * settings.num_pairs + settings.startup_pairs)
        layers = settings.num_probe_layers
        breakers = [
            breaker_with_probes(self.scratch / f"p{n}", self.breaker, n, layers) for n in counts
        ]
        if settings.compiled:
            # A compiled graph keeps its probes: one engine for each number of them.
            if states or cross:
                self._merged(self.breaker, (), states, cross)
            for number, other in zip(counts, breakers, strict=True):
                self._merged(other, (), {f"probes-{number}": GuardState("enforce")}, [])
        elif states or counts or cross:
            states |= {f"probes-{n}": GuardState("enforce", n) for n in counts}
            self._merged(self.breaker, breakers, states, cross)
        if "dynamic" in arms:
            self._dynamic()
        if settings.startup_pairs:
            self._startup()

    def _merged(
        self,
        breaker: Breaker,
        others: Any,
        states: dict[str, GuardState],
        cross: list[str],
    ) -> None:
        with ExitStack() as stack:
            engine, switch = self._start(stack, self.engines.guarded_arguments(breaker), others)
            runs = {name: switched(engine, switch, state) for name, state in states.items()}
            plain = switched(engine, switch, PLAIN)
            for workload, batch in self._configs():
                for name, run in runs.items():
                    self._compare((name, run), ("plain", plain), workload, batch)
                if others:
                    fewer, more = (f"probes-{len(o.manifest.probes)}" for o in others)
                    self._compare((more, runs[more]), (fewer, runs[fewer]), workload, batch)
                self._own_times(engine, switch, states, workload, batch)
            # The last arm left the store empty.
            longest = max(self.settings.workloads, key=lambda w: w.prompt_tokens + w.output_tokens)
            run = switched(engine, switch, GuardState("enforce"))
            run(self.settings.batches[0], longest.prompt_tokens, longest.output_tokens)
            for number in sorted({len(b.manifest.probes) for b in (breaker, *others)}):
                counted = footprint(engine.scheduler, switch.guard, number)
                self.report.footprints.append(counted)
            for name in cross:
                self._cross(name, engine, switch, plain)

    def _dynamic(self) -> None:
        with ExitStack() as stack:
            arguments = self.engines.guarded_arguments(self.breaker, "dynamic")
            engine, switch = self._start(stack, arguments, ())
            from vllm.lora.request import LoRARequest

            lora = LoRARequest(ADAPTER_NAME, 1, str(self.breaker.adapter_dir))
            arm = switched(engine, switch, GuardState("enforce"), lora)
            plain = switched(engine, switch, PLAIN)
            for workload, batch in self._configs():
                self._compare(("dynamic", arm), ("plain, LoRA engine", plain), workload, batch)

    def _cross(self, name: str, engine: BenchEngine, switch: GuardSwitch, plain: Run) -> None:
        """An alternative in an engine of its own; a row that says why, where it cannot run."""
        other: Alternative | None = None
        reason = None
        switch.set(PLAIN)
        try:
            start = self.engines.start
            if name == "hidden-states":
                arguments = self.engines.plain_arguments(self.breaker)
                other = HiddenStates(start, arguments, self.breaker, self.scratch)
            else:
                arguments = self.engines.plain_arguments()
                other = GuardModel(start, arguments, engine, lambda: switch.set(PLAIN))
            other.block(1, 8, 2)
        except Exception as e:  # noqa: BLE001 (whatever vLLM says there is the finding)
            reason = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"
        try:
            for workload, batch in self._configs():
                if other is None or reason is not None:
                    self._add(
                        Row(
                            arm=name,
                            baseline="plain",
                            workload=workload,
                            batch=batch,
                            cross_engine=True,
                            unavailable=reason,
                        )
                    )
                    self.progress.advance(name, self.settings.num_pairs)
                else:
                    self._compare((name, other.block), ("plain", plain), workload, batch, True)
        finally:
            if other is not None:
                other.close()

    def _start(
        self, stack: ExitStack, arguments: dict[str, Any], others: Any
    ) -> tuple[BenchEngine, GuardSwitch]:
        self.progress.show("starting an engine")
        engine = self.engines.start(arguments)
        stack.callback(engine.close)
        switch = GuardSwitch(engine.llm, *others, compiled=self.settings.compiled)
        stack.callback(switch.restore)
        return engine, switch

    def _compare(
        self,
        arm: tuple[str, Run],
        baseline: tuple[str, Run],
        workload: Workload,
        batch: int,
        cross_engine: bool = False,
    ) -> None:
        (arm_name, run_arm), (baseline_name, run_baseline) = arm, baseline
        lengths = (batch, workload.prompt_tokens, workload.output_tokens)
        self.progress.show(f"{arm_name}, {workload.name}, batch {batch}")
        for _ in range(2 if self.settings.compiled else 1):
            # Whatever is compiled late, for shapes that come up late, must be compiled by then.
            short = workload.output_tokens if self.settings.compiled else _WARM_UP_TOKENS
            warm = (*lengths[:2], min(short, workload.output_tokens))
            run_arm(*warm)
            run_baseline(*warm)
        builder = RowBuilder()
        for pair in alternating_pairs(
            self.settings.num_pairs, lambda: run_arm(*lengths), lambda: run_baseline(*lengths)
        ):
            builder.add(*pair)
            self.progress.advance(f"{arm_name}, {workload.name}, batch {batch}")
        self._add(builder.row(arm_name, baseline_name, workload, batch, cross_engine))

    def _own_times(
        self,
        engine: BenchEngine,
        switch: GuardSwitch,
        states: dict[str, GuardState],
        workload: Workload,
        batch: int,
    ) -> None:
        for name, state in states.items():
            self.progress.show(f"{name}, {workload.name}, batch {batch}: own time")
            switch.set(state)
            prompts = engine.prompts(batch, workload.prompt_tokens)

            def run(prompts: list[list[int]] = prompts) -> Block:
                return engine.run(prompts, workload.output_tokens)

            times = own_time(switch, engine.llm.llm_engine, run, compiled=self.settings.compiled)
            row = OwnTimeRow(arm=name, workload=workload, batch=batch, times=times)
            self.report.own_times.append(row)

    def _startup(self) -> None:
        pairs = self.settings.startup_pairs
        self.progress.show("start-up")
        self.report.startup = startup_times(
            self.engines.guarded_arguments(self.breaker),
            self.engines.plain_arguments(),
            pairs,
            lambda: self.progress.advance("start-up"),
        )

    def _configs(self) -> list[tuple[Workload, int]]:
        return [(w, b) for w in self.settings.workloads for b in self.settings.batches]

    def _add(self, row: Row) -> None:
        self.report.rows.append(row)
        self.progress.row(row)
