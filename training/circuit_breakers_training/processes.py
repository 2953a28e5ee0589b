"""The processes of one training run, by accelerate: one, or as many as `accelerate launch` starts.

    recipe.batch_size rows of a step ─ share of each process ─ parts of micro_batch_size
                                                                  │
    losses of the whole batch ◄─ sum over parts and processes ◄───┘

A run without a launcher is one process: nothing is wrapped, and nothing is sent anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    gather_object,
)

from accelerate import Accelerator
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["Processes"]

_T = TypeVar("_T")

_MODES = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
}


class Processes:
    """This process among all those that train together."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        """Joins the other processes, if a launcher has started any.

        Args:
            device: "cpu", or "cuda" for this process's own GPU.
        Raises:
            ConfigError: the launcher was asked for what cannot work or would have no effect.
        """
        _refuse_settings_of_the_recipe(recipe)
        try:
            self.accelerator = Accelerator(
                cpu=device == "cpu",
                # Streams and recipe decide the precision; only DeepSpeed has to be told.
                mixed_precision=_mixed_precision(recipe),
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
        except ImportError as error:
            raise ConfigError(
                f"accelerate was asked for what is not installed here ({error}); install it, or "
                "use FSDP2, which shards as much and needs nothing more"
            ) from error
        self._refuse_modes()
        # Kept, as accelerate forgets them when the processes part.
        self.index: int = self.accelerator.process_index
        """0 is the main process, which alone writes files."""
        self.count: int = self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_plain(self) -> bool:
        """No launcher's mode: the model is used as it is."""
        return self.accelerator.distributed_type == DistributedType.NO

    @property
    def is_sharded(self) -> bool:
        """A process keeps only a part of each parameter."""
        return self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )

    @property
    def is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """This process's part of rows that every process knows.

        Every count-th one: rows come sorted by length, so that shares take about the same time.
        """
        return list(rows[self.index :: self.count])

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        mine = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        added: list[float] = self.accelerator.reduce(mine, "sum").tolist()
        return added

    def gather(self, value: _T) -> list[_T]:
        """The value that each process gives, in the order of processes."""
        if self.count == 1:
            return [value]
        gathered: list[_T] = gather_object([value])
        return gathered

    def agreed(self, value: _T, what: str) -> _T:
        """`value`, once all processes have the same one.

        Raises:
            ConfigError: they differ, as with directories that only one machine sees.
        """
        everyone = self.gather(value)
        if any(other != everyone[0] for other in everyone):
            raise ConfigError(
                f"processes found different {what}: {everyone}; expected the same files for all; "
                "put data, model and output on a file system that all machines share"
            )
        return value

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do."""
        with self.accelerator.main_process_first():
            yield

    def leave(self) -> None:
        """End the common part of the run: no process waits for another any more.

        What only the main process does next may take long, and no collective waits that long.
        """
        self.accelerator.free_memory()
        if self.is_plain:
            return
        self.accelerator.end_training()
        if self.is_deepspeed:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            # Else models that are loaded from now on would be sharded over processes that are gone.
            unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)

    def _refuse_modes(self) -> None:
        accelerator = self.accelerator
        mode = accelerator.distributed_type
        if mode not in _MODES:
            raise ConfigError(
                f"got accelerate's mode {mode.value}, expected one of "
                f"{', '.join(sorted(m.value for m in _MODES))}; change distributed_type in the "
                "config file of accelerate"
            )
        if mode == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ConfigError(
                "got FSDP version 1, expected 2, which alone shards frozen and trained parameters "
                "together; set fsdp_version: 2 in the config file of accelerate"
            )
        if _flag("ACCELERATE_USE_FSDP") and mode != DistributedType.FSDP:
            raise ConfigError(
                f"FSDP was asked for, but accelerate runs {mode.value}: it shards on several GPUs "
                "only; start it on GPUs, or without FSDP"
            )
        if _flag("ACCELERATE_USE_DEEPSPEED") and mode != DistributedType.DEEPSPEED:
            raise ConfigError(
                f"DeepSpeed was asked for, but accelerate runs {mode.value}: it shards on GPUs "
                "only; start it on GPUs, or without DeepSpeed"
            )
        if self.is_deepspeed and accelerator.state.deepspeed_plugin.zero_stage != 3:
            raise ConfigError(
                f"got ZeRO stage {accelerator.state.deepspeed_plugin.zero_stage}, expected 3: the "
                "adapter's gradients and optimiser state are small, only sharded weights save "
                "memory; set zero_stage: 3, or use DDP"
            )
        if accelerator.parallelism_config is not None:
            raise ConfigError(
                "got a parallelism_config in the config file of accelerate, expected none: rows "
                "are split over processes, never sequences or matrices; remove it"
            )


def _refuse_settings_of_the_recipe(recipe: Recipe) -> None:
    """A launcher's setting that the recipe decides is refused rather than left without effect."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if given not in ("no", recipe.precision):
        raise ConfigError(
            f"accelerate was given mixed_precision {given}, but the recipe's precision is "
            f"{recipe.precision}; set mixed_precision: 'no' and choose in the recipe"
        )
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        raise ConfigError(
            "accelerate was given gradient_accumulation_steps, which has no effect: a step is "
            "always the recipe's batch_size; leave it out and set micro_batch_size in the recipe"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError(
            "accelerate was given a dynamo_backend, which has no effect; leave it out and set "
            "compile = true in the recipe"
        )
    if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "accelerate was given fsdp_activation_checkpointing, which would run each block three "
            "times; leave it out and set gradient_checkpointing = true in the recipe"
        )


def _mixed_precision(recipe: Recipe) -> str:
    return "bf16" if _flag("ACCELERATE_USE_DEEPSPEED") and recipe.precision == "bf16" else "no"


def _flag(name: str) -> Any:
    return os.environ.get(name, "false").lower() == "true"
