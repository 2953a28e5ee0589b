"""What a training step costs, beside the published one: `circuit-breakers bench train`.

Both loops are in one process and take the same rows in turn (A B B A ...), so each ratio compares
neighbours. Each shortcut's share is measured by a loop that does without it; peak memory is that of
fresh processes.

    rows -> loops -> arms -> run -> report
"""

from circuit_breakers_training.bench.arms import ARMS, chosen_arms
from circuit_breakers_training.bench.report import print_report, report_json
from circuit_breakers_training.bench.run import BenchReport, BenchSettings, bench_training

__all__ = [
    "ARMS",
    "BenchReport",
    "BenchSettings",
    "bench_training",
    "chosen_arms",
    "print_report",
    "report_json",
]
