"""Start-up time, guarded and plain, each in a fresh interpreter; run as a module, it is the child.

The merged checkpoint is there already, as on any start but the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from circuit_breakers.engine.bench.ratios import Spread, spread
from circuit_breakers.errors import NotReadyError

__all__ = ["Startup", "startup_times"]

_MARK = "circuit-breakers-started "
_LIMIT_S = 900


@dataclass(frozen=True, kw_only=True)
class Startup:
    """From the start of the interpreter until the engine takes requests, in seconds."""

    guarded_s: list[float]
    plain_s: list[float]
    guarded_engine_s: list[float]
    """Of which the engine, without imports."""
    plain_engine_s: list[float]
    ratio: Spread
    """Guarded over plain of each pair; 1 is free."""


def startup_times(
    guarded: dict[str, Any],
    plain: dict[str, Any],
    num_pairs: int,
    done: Callable[[], None] = lambda: None,
) -> Startup:
    """Starts engines with these arguments of vllm.LLM in turn, A B B A.

    Raises:
        NotReadyError: one did not start.
    """
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for i in range(num_pairs):
        for is_guarded in (True, False) if i % 2 else (False, True):
            times[is_guarded].append(_start(guarded if is_guarded else plain))
        done()
    ratios = spread(g[0] / p[0] for g, p in zip(times[True], times[False], strict=True))
    assert ratios is not None, "at least one pair"
    return Startup(
        guarded_s=[t for t, _ in times[True]],
        plain_s=[t for t, _ in times[False]],
        guarded_engine_s=[t for _, t in times[True]],
        plain_engine_s=[t for _, t in times[False]],
        ratio=ratios,
    )


def _start(arguments: dict[str, Any]) -> tuple[float, float]:
    """Seconds until ready, and seconds of these that the engine took."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        began_s = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert child.stdout is not None, "a pipe was asked for"
            for line in child.stdout:
                if line.startswith(_MARK):
                    ready_s = time.perf_counter() - began_s
                    child.communicate(timeout=_LIMIT_S)
                    return ready_s, float(line.removeprefix(_MARK))
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    raise NotReadyError(f"an engine did not start: {last}; start it by hand with the same options")


def _child(arguments: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    began_s = time.perf_counter()
    llm: Any = LLM(**arguments)
    sys.stdout.write(f"\n{_MARK}{time.perf_counter() - began_s}\n")
    sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
