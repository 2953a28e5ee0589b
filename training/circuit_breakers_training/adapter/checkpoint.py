"""One file from which a killed training run goes on: parameters and optimiser state, whole.

The file is safetensors, never pickle, and is replaced in one step, so that a kill at any moment
leaves either the old checkpoint or the new one. The position in the data and the random state of
a step follow from the step's number (batches.plan_steps, optimizer_step.take_step), so that the
next run may have another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuit_breakers.artifact.files import write_atomically
from circuit_breakers.errors import ConfigError

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_VERSION = "2"


class Checkpoint(NamedTuple):
    step: int
    """Optimiser steps done."""
    tensors: dict[str, Tensor]
    """As given to save_checkpoint."""


def save_checkpoint(
    path: Path, *, run_digest: str, step: int, tensors: Mapping[str, Tensor]
) -> None:
    """Replace the checkpoint at `path` by the state after `step` steps.

    Args:
        run_digest: identifies recipe, base weights and data; only a run with the same one may go on
            from here.
        tensors: ParallelStreams.whole_state, on the CPU.
    """
    metadata = {"version": _VERSION, "run_digest": run_digest, "step": str(step)}
    write_atomically(path, save(dict(tensors), metadata=metadata))


def load_checkpoint(path: Path, *, run_digest: str) -> Checkpoint | None:
    """The checkpoint at `path`, or None if there is none.

    Raises:
        ConfigError: the file belongs to another recipe, other weights or data, or is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} is damaged ({error}), expected a safetensors file; "
            "delete it to train from the start"
        ) from error
    if metadata.get("version") != _VERSION:
        raise ConfigError(
            f"checkpoint {str(path)!r} has format {metadata.get('version', 'none')}, expected "
            f"{_VERSION}; it was written by another release: delete it to train from the start"
        )
    if metadata.get("run_digest") != run_digest:
        raise ConfigError(
            f"checkpoint {str(path)!r} is of a run with other settings, weights or data (got "
            f"digest {metadata.get('run_digest', 'none')[:12]}, expected {run_digest[:12]}); "
            "choose another output directory, delete the checkpoint to train from the start, or "
            "give the recipe, model and data it was made with"
        )
    return Checkpoint(step=int(metadata["step"]), tensors=tensors)
