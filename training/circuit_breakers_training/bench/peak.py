"""Peak memory of a loop in a fresh process; run as a module, it is that process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from circuit_breakers.errors import NotReadyError
from circuit_breakers.hardware import pick_device
from circuit_breakers_training.bench.arms import make_loop
from circuit_breakers_training.bench.rows import bench_rows
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.run_log import peak_rss_mib

__all__ = ["Peak", "peak_memory"]

_MARK = "circuit-breakers-peak "
_NUM_STEPS = 2
"""The optimiser's state exists from the second one's start."""
_LIMIT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of one loop's process, loading included, in bytes."""

    arm: str
    loaded_bytes: int
    """Before the first step: interpreter, libraries and model. On a GPU the model alone."""
    peak_bytes: int


def peak_memory(arm: str, recipe: Recipe, model_dir: Path, rows_per_kind: int) -> Peak:
    """Two steps in a fresh interpreter.

    Raises:
        NotReadyError: the process died, for want of memory for instance.
    """
    order = [arm, recipe.model_dump_json(), str(model_dir), rows_per_kind]
    command = [sys.executable, "-m", __spec__.name, json.dumps(order)]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=_LIMIT_S, check=False
        )
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return Peak(**json.loads(line.removeprefix(_MARK)))
    raise NotReadyError(
        f"the process of {arm!r} ended with exit code {done.returncode}: {last}; expected two "
        "steps; use fewer rows per kind if memory ran out"
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in _status_lines():
        # The high-water mark of this very program; resource.getrusage keeps the parent's.
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return int(peak_rss_mib() * 2**20)


def _status_lines() -> list[str]:
    status = Path("/proc/self/status")
    return status.read_text("utf-8").splitlines() if status.is_file() else []


def _child(arm: str, recipe_json: str, model_dir: str, rows_per_kind: int) -> None:
    device = torch.device(pick_device())
    recipe = Recipe.model_validate_json(recipe_json)
    rows = bench_rows(recipe, Path(model_dir), rows_per_kind=rows_per_kind, num_steps=_NUM_STEPS)
    loop = make_loop(arm, recipe, Path(model_dir), device)
    loaded_bytes = _peak_bytes(device)
    for step_rows in rows:
        loop.step(step_rows, recipe.steps // 2)
    peak = Peak(arm=arm, loaded_bytes=loaded_bytes, peak_bytes=_peak_bytes(device))
    sys.stdout.write(f"\n{_MARK}{json.dumps(asdict(peak))}\n")


if __name__ == "__main__":
    _child(*json.loads(sys.argv[1]))
