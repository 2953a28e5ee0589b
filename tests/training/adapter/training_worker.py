"""One of the processes that test_parallel_streams.py launches: trains the jobs of a JSON file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch.distributed.tensor import DTensor

from accelerate import PartialState
from circuit_breakers_training.adapter import trainer
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter
from circuit_breakers_training.data.jsonl import read_conversations
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe


class SimulatedCrashError(Exception):
    """Stands for whatever ends a run early."""


def train_job(job: dict[str, Any], data: Path, processes: Processes | None) -> None:
    """Train one adapter; a job with `crash_at` ends before that step, counted from 0."""
    take_step = trainer.take_step

    def take_step_or_crash(*args: Any) -> dict[str, Any]:
        parameters = args[1].streams.parameters.values()
        assert all(isinstance(p, DTensor) for p in parameters) == job.get("dtensors", False)
        if args[-1] == job.get("crash_at"):
            raise SimulatedCrashError
        return take_step(*args)

    trainer.take_step = take_step_or_crash
    try:
        train_adapter(
            Recipe.model_validate(job["recipe"]),
            model_dir=Path(job["model_dir"]),
            rows=TrainingRows(
                **{path.name: read_conversations(path) for path in sorted(data.iterdir())}
            ),
            out=Path(job["out"]),
            processes=processes,
        )
    except SimulatedCrashError:
        pass
    finally:
        trainer.take_step = take_step


def use_mode(mode: str) -> None:
    """Shard over CPU processes, which accelerate's launcher turns on for GPUs only."""
    state = AcceleratorState()
    if mode == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        plugin = DeepSpeedPlugin(zero_stage=3)
        plugin.set_mixed_precision("no")
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = plugin
        state.distributed_type = DistributedType.DEEPSPEED
    else:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=mode == "fsdp2-efficient",
        )
        state.distributed_type = DistributedType.FSDP
        # Read by transformers as it loads weights.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    PartialState._shared_state["distributed_type"] = state.distributed_type


def main() -> None:
    torch.set_num_threads(1)
    work = json.loads(Path(sys.argv[1]).read_text())
    processes = Processes(Recipe.model_validate(work["jobs"][0]["recipe"]))
    assert processes.count == 2
    if work["mode"] != "ddp":
        use_mode(work["mode"])
    for job in work["jobs"]:
        processes = Processes(Recipe.model_validate(job["recipe"]))
        # What shows that FSDP2 has sharded the adapter.
        job["dtensors"] = work["mode"].startswith("fsdp2")
        train_job(job, Path(work["data"]), processes)
    processes.leave()


if __name__ == "__main__":
    main()
