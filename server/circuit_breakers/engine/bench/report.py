"""A benchmark's report: tables for the terminal, JSON with all raw pairs for everything else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from circuit_breakers.engine.bench.ratios import Latency, Row, Spread
from circuit_breakers.engine.bench.run import BenchReport

__all__ = ["print_report", "report_json"]

_PIPED_WIDTH = 160
_GIB = 1 << 30


def report_json(report: BenchReport) -> str:
    """Everything, times in seconds and sizes in bytes."""
    return json.dumps(asdict(report), indent=1, default=_to_json) + "\n"


def print_report(report: BenchReport, console: Console | None = None) -> None:
    """Tables of the report, on standard output unless told otherwise."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, file=console.file)
    machine = report.machine
    console.print(
        f"$ {report.command}\n"
        f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_bytes / _GIB:.0f} GiB, "
        f"accelerator: {machine.accelerator or 'none'}; Python {machine.python}, "
        f"torch {machine.torch}, vLLM {machine.vllm}, circuit-breakers {machine.circuit_breakers}\n"
        f"model {report.model}, breaker {report.breaker} {report.breaker_digest[:12]}, "
        f"{'compiled' if report.settings.compiled else 'eager'}",
        highlight=False,
        markup=False,
    )
    for table in (
        _throughput(report.rows),
        _steps(report.rows),
        _latency(report.rows),
        _own_time(report),
        _memory(report),
        _startup(report),
    ):
        if table.row_count:
            console.print(table)


def _throughput(rows: Iterable[Row]) -> Table:
    table = _table(
        "Throughput: delivered tokens/s; ratio of neighbouring blocks, 1 is free",
        *_KEYS,
        *("arm", "baseline", "ratio", "quartiles", "min-max", "pairs"),
    )
    table.caption = "* two engines in one process, blocks in turn; all others in one engine"
    for row in rows:
        if row.ratio is None:
            table.add_row(*_key(row), "not available:", row.unavailable)
            continue
        ratio = row.ratio
        table.add_row(
            *_key(row),
            _number(row.arm_tokens_per_s),
            _number(row.baseline_tokens_per_s),
            *_spread_cells(ratio),
            f"{ratio.low:.4f}-{ratio.high:.4f}",
            str(ratio.count),
        )
    return table


def _steps(rows: Iterable[Row]) -> Table:
    table = _table(
        "Equal engine steps: median step time over the baseline's, 1 is free; tokens/s of prefill",
        *_KEYS,
        *("prefill", "quartiles", "decode", "quartiles", "prefill tok/s", "baseline"),
    )
    for row in rows:
        if row.prefill_step_ratio or row.decode_step_ratio:
            table.add_row(
                *_key(row),
                *_spread_cells(row.prefill_step_ratio),
                *_spread_cells(row.decode_step_ratio),
                _number(row.arm_prefill_tokens_per_s),
                _number(row.baseline_prefill_tokens_per_s),
            )
    return table


def _latency(rows: Iterable[Row]) -> Table:
    table = _table(
        "Delivered latency, ms: median / p99 over all requests (TTFT) and gaps (ITL)",
        *_KEYS,
        *("TTFT", "baseline", "ITL", "baseline"),
    )
    for row in rows:
        if row.arm_ttft:
            cells = (row.arm_ttft, row.baseline_ttft, row.arm_itl, row.baseline_itl)
            table.add_row(*_key(row), *map(_latency_cell, cells))
    return table


def _own_time(report: BenchReport) -> Table:
    table = _table(
        "The guard's own time, microseconds a step (a pass of its own, under timers)",
        *("arm", "workload", "batch", "steps"),
        *("worker", "scheduler", "delivery", "sum", "of the step"),
    )
    for row in report.own_times:
        for times in row.times:
            total_s = sum(times.side_s.values())
            table.add_row(
                row.arm,
                row.workload.name,
                str(row.batch),
                f"{times.num_steps} {'prefill' if times.prefill else 'decode'}",
                *(
                    f"{1e6 * times.side_s[side]:.1f}"
                    + (" + op" if times.op_in_graph and side == "worker" else "")
                    for side in ("worker", "scheduler", "delivery")
                ),
                f"{1e6 * total_s:.1f}",
                f"{total_s / times.step_s:.2%}",
            )
    return table


def _memory(report: BenchReport) -> Table:
    table = _table(
        "Memory of the block score store",
        *("probes", "blocks", "live MiB", "live blocks", "full MiB", "KV cache MiB", "share"),
    )
    for counted in report.footprints:
        table.add_row(
            str(counted.num_probes),
            f"{counted.capacity_blocks} x {counted.block_tokens}",
            f"{counted.live_bytes / 2**20:.3f}",
            str(counted.live_blocks),
            f"{counted.full_bytes / 2**20:.2f}",
            f"{counted.kv_cache_bytes / 2**20:.0f}",
            f"{counted.full_share:.3%}",
        )
    return table


def _startup(report: BenchReport) -> Table:
    table = _table(
        "Start-up in fresh interpreters, seconds", "kind", "until ready", "of it the engine"
    )
    startup = report.startup
    if startup is not None:
        for kind, total_s, engine_s in (
            ("guarded", startup.guarded_s, startup.guarded_engine_s),
            ("plain", startup.plain_s, startup.plain_engine_s),
        ):
            table.add_row(kind, *(" ".join(f"{t:.2f}" for t in s) for s in (total_s, engine_s)))
        table.add_row("ratio", f"{startup.ratio.median:.4f}", "")
    return table


_KEYS = ("comparison", "workload", "batch")


def _key(row: Row) -> tuple[str, str, str]:
    mark = " *" if row.cross_engine else ""
    return f"{row.arm} / {row.baseline}{mark}", row.workload.name, str(row.batch)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    return table


def _spread_cells(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "", ""
    return f"{spread.median:.4f}", f"{spread.q1:.4f}-{spread.q3:.4f}"


def _latency_cell(latency: Latency | None) -> str:
    return "" if latency is None else f"{1e3 * latency.median_s:.2f} / {1e3 * latency.p99_s:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _to_json(value: Any) -> Any:
    assert isinstance(value, BaseModel), f"no JSON of {type(value).__name__}"
    return value.model_dump(mode="json")
