"""The `circuit-breakers` command. Exit codes: 0 ok, 1 failed check, 2 wrong usage; `chat`: 3 trip.

A module a group of subcommands. Heavy imports stay inside the subcommands, so that --help answers
at once.
"""

from circuit_breakers.cli.apps import app
from circuit_breakers.cli.attack import attack_search, attack_soft_prompt
from circuit_breakers.cli.auditing import audit_export, audit_prune, audit_verify, replay
from circuit_breakers.cli.benchmarks import bench_api, bench_serve, bench_train
from circuit_breakers.cli.chat import chat
from circuit_breakers.cli.datasets import data_build, data_import
from circuit_breakers.cli.evaluation import evaluate
from circuit_breakers.cli.gate import gate
from circuit_breakers.cli.keys import keys_new
from circuit_breakers.cli.scoring import score
from circuit_breakers.cli.serving import serve, verify, version
from circuit_breakers.cli.training import recipes, report, train

__all__ = [
    "app",
    "attack_search",
    "attack_soft_prompt",
    "audit_export",
    "audit_prune",
    "audit_verify",
    "bench_api",
    "bench_serve",
    "bench_train",
    "chat",
    "data_build",
    "data_import",
    "evaluate",
    "gate",
    "keys_new",
    "main",
    "recipes",
    "replay",
    "report",
    "score",
    "serve",
    "train",
    "verify",
    "version",
]


def main() -> None:
    """Entry point; ends the process."""
    app()
