"""What the guard costs, and what people do instead costs: `circuit-breakers bench serve`.

Two processes side by side differ by more than the guard does. So both arms of a comparison run in
one engine, the guard switched on and off between blocks of requests (A B B A ...), and each ratio
compares neighbours.

    blocks -> arms -> ratios -> run -> report
"""

from circuit_breakers.engine.bench.blocks import parse_workload
from circuit_breakers.engine.bench.engines import ARMS, BenchSettings
from circuit_breakers.engine.bench.report import print_report, report_json
from circuit_breakers.engine.bench.run import BenchReport, bench_serving

__all__ = [
    "ARMS",
    "BenchReport",
    "BenchSettings",
    "bench_serving",
    "parse_workload",
    "print_report",
    "report_json",
]
