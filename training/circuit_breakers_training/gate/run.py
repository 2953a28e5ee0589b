"""All checks of a gate, in order, and their verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal

from rich.console import Console

from circuit_breakers.errors import CircuitBreakersError
from circuit_breakers_training.evaluation.results import environment
from circuit_breakers_training.gate.bypass import bypass
from circuit_breakers_training.gate.capability import capability
from circuit_breakers_training.gate.conformance import conformance
from circuit_breakers_training.gate.detection import detection
from circuit_breakers_training.gate.identity import identity
from circuit_breakers_training.gate.leaks import leaks
from circuit_breakers_training.gate.live import ATTACKS, attack, direct, over_refusal
from circuit_breakers_training.gate.overhead import overhead
from circuit_breakers_training.gate.rows import NotRun, Row
from circuit_breakers_training.gate.target import Target

__all__ = ["CHECKS", "Check", "Outcome", "Result", "run_gate"]

RESULT_VERSION: Final = 1

Status = Literal["passed", "failed", "not run"]
Check = Callable[[Target], Sequence[Row] | NotRun]

CHECKS: Final[Mapping[str, Check]] = {
    "identity": identity,
    "detection": detection,
    "live": direct,
    **{name: partial(attack, suite=name) for name in ATTACKS},
    "over-refusal": over_refusal,
    "capability": capability,
    "overhead": overhead,
    "conformance": conformance,
    "bypass": bypass,
    # Last, as it counts what all others made the server do.
    "leaks": leaks,
}
"""By the name that --skip takes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check came to."""

    name: str
    status: Status
    rows: tuple[Row, ...] = ()
    reason: str = ""
    """Why it was not run, or could not end."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields, by name."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a gate came to."""

    target: Target
    outcomes: tuple[Outcome, ...]
    started: datetime

    @property
    def missed(self) -> tuple[str, ...]:
        """Checks that failed, or were neither run nor named by --skip."""
        skipped = self.target.settings.skip
        return tuple(
            o.name
            for o in self.outcomes
            if o.status == "failed" or (o.status == "not run" and o.name not in skipped)
        )

    @property
    def passed(self) -> bool:
        """Whether this may be shipped; a gate of nothing says no."""
        return not self.missed and any(o.status == "passed" for o in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Everything, without text of a prompt or an answer."""
        target = self.target
        told = ("digest", "policy", "mode", "action")
        return {
            "schema_version": RESULT_VERSION,
            "passed": self.passed,
            "missed": list(self.missed),
            "started": self.started.isoformat(timespec="seconds"),
            "breaker": {"name": target.breaker.manifest.name, "digest": target.breaker.digest},
            "model": target.breaker.manifest.base_model.model_dump(mode="json"),
            "server": {
                "place": target.server.place,
                "max_model_len": target.model.max_tokens,
                **{name: target.served.get(name) for name in told},
                "thresholds": {
                    probe["name"]: probe["threshold_logit"]
                    for probe in target.served.get("probes", [])
                },
            },
            "data_sha256": target.dataset.digests,
            "settings": target.settings.to_json(),
            "bars_changed": list(target.bars.changed),
            "environment": environment("server"),
            "checks": [outcome.to_json() for outcome in self.outcomes],
        }


def run_gate(
    target: Target, console: Console | None = None, checks: Mapping[str, Check] = CHECKS
) -> Result:
    """The outcome of every check; one that fails does not keep the others from running."""
    started = datetime.now(UTC)
    outcomes = []
    for name, check in checks.items():
        outcome = _outcome(name, check, target)
        outcomes.append(outcome)
        if console is not None:
            console.print(f"{name}: {outcome.status} {outcome.reason}".rstrip(), markup=False)
    return Result(target=target, outcomes=tuple(outcomes), started=started)


def _outcome(name: str, check: Check, target: Target) -> Outcome:
    if name in target.settings.skip:
        return Outcome(name=name, status="not run", reason="named by --skip")
    started = time.perf_counter()
    try:
        found = check(target)
    except CircuitBreakersError as error:
        return Outcome(
            name=name,
            status="failed",
            reason=str(error),
            seconds=time.perf_counter() - started,
        )
    seconds = time.perf_counter() - started
    if isinstance(found, NotRun):
        return Outcome(name=name, status="not run", reason=found.reason, seconds=seconds)
    judged = [row.passed for row in found if row.passed is not None]
    assert judged, "a check has a bar at least"
    return Outcome(
        name=name,
        status="passed" if all(judged) else "failed",
        rows=tuple(found),
        seconds=seconds,
    )
