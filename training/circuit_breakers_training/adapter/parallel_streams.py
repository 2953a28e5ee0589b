"""Both streams and their optimiser, as one process or many train them.

    plain      one process; the model is used as it is
    DDP        a whole model in every process, gradients averaged
    FSDP2      every parameter sharded, blocks gathered as they run
    ZeRO-3     the same by DeepSpeed

In every mode a step's update is that of the whole batch in one process, and the saved state is
whole, so that a run may go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.adapter.zero_state import (
    configure_zero,
    read_zero,
    set_zero,
    set_zero_steps,
    zero_steps,
)
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe

__all__ = ["ParallelStreams"]

_T = TypeVar("_T")

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE_KEYS = ("step", *_MOMENTS)


class _Root(nn.Module):
    """What accelerate wraps: runs a computation on the model inside its own forward pass.

    Wrappers act when their root is called. A step calls the model twice and compares hidden states
    of the two passes, all of which has to happen within one such call.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.model = streams.module
        # Read by accelerate: the width, and that each block is a unit of sharding.
        self.config = self.model.config
        self._no_split_modules = streams.block_class_names

    def forward(self, compute: Callable[[], _T]) -> _T:
        return compute()


class ParallelStreams:
    """`Streams` with an AdamW optimiser, in the mode that accelerate was started in."""

    def __init__(self, recipe: Recipe, model_dir: Path, processes: Processes) -> None:
        """Load the model and share it out.

        Raises:
            ModelError: the directory holds no decoder that can be loaded.
            ConfigError: layers or adapter modules do not exist in this model.
        """
        self.processes = processes
        # A model that is to be sharded may be larger than one device.
        load_on = torch.device("cpu") if processes.is_sharded else processes.device
        self.streams = Streams(recipe, model_dir, load_on)
        self._max_grad_norm = recipe.max_grad_norm
        self._root: Callable[[Callable[[], Any]], Any] | None = None
        if processes.is_deepspeed:
            configure_zero(processes.accelerator.state.deepspeed_plugin, recipe)
            if recipe.precision == "bf16":
                # DeepSpeed wants one type for all, and keeps what it trains in float32 as well.
                for parameter in self.streams.parameters.values():
                    parameter.data = parameter.data.bfloat16()
        self.optimizer: Any = torch.optim.AdamW(
            self.streams.parameters.values(), lr=recipe.learning_rate, weight_decay=0.0
        )
        if not processes.is_plain:
            self._root, self.optimizer = processes.accelerator.prepare(
                _Root(self.streams), self.optimizer
            )
            self.streams.device = processes.device

    def inside(self, compute: Callable[[], _T]) -> _T:
        """`compute()`, which may run the streams; a collective operation of all processes."""
        if self._root is None:
            return compute()
        result: _T = self._root(compute)
        return result

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the step to come; before its first backward pass."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextmanager
    def part(self, *, last: bool) -> Iterator[Callable[[Tensor], None]]:
        """Forward and backward pass of one part of a step; gradients travel with the last one.

        Gives the function that adds up the gradients of a part's share of the loss.
        """
        accelerator = self.processes.accelerator
        if self.processes.is_deepspeed:
            accelerator.deepspeed_engine_wrapped.engine.set_gradient_accumulation_boundary(last)
        travels = last or self.processes.is_plain
        with nullcontext() if travels else accelerator.no_sync(self._root):
            yield lambda loss: self._backward(loss, last=last)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # All modes average gradients over processes, but the shares of a loss add up.
        loss = loss * self.processes.count
        if self.processes.is_deepspeed:
            # Clips and does the optimiser step as well, after the last part.
            engine = self.processes.accelerator.deepspeed_engine_wrapped
            engine.backward(loss, sync_gradients=last)
        else:
            loss.backward()

    def clip_gradients(self) -> float:
        """Scale the gradients added up to the recipe's norm at most; returns the L2 norm they had.

        DeepSpeed has clipped and done the step already, and its norm may hide what is not finite:
        it counts such a part as -1.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.processes.is_plain:
            norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        else:
            norm = self.processes.accelerator.clip_grad_norm_(parameters, self._max_grad_norm)
        return float(_whole(norm) if isinstance(norm, Tensor) else norm)

    def update(self) -> None:
        """Do the optimiser step with the clipped gradients, and forget them."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_parameters(self) -> dict[str, Tensor]:
        """The adapter's parameters by name, on the CPU; a collective operation."""
        return {name: self._read(p) for name, p in self.streams.parameters.items()}

    def whole_state(self) -> dict[str, Tensor]:
        """Parameters and optimiser state as a checkpoint keeps them; a collective operation."""
        tensors = {f"parameter/{n}": t for n, t in self.whole_parameters().items()}
        for name, parameter in self.streams.parameters.items():
            for key in _STATE_KEYS:
                tensors[f"optimizer/{key}/{name}"] = self._read(parameter, key)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters and optimiser state to those of `whole_state`, in whatever mode."""
        for name, parameter in self.streams.parameters.items():
            state = {key: tensors[f"optimizer/{key}/{name}"] for key in _STATE_KEYS}
            if self.processes.is_deepspeed:
                set_zero_steps(self.optimizer, state["step"])
                set_zero(parameter, tensors[f"parameter/{name}"])
                for key in _MOMENTS:
                    set_zero(parameter, state[key], key)
                continue
            with torch.no_grad():
                parameter.copy_(_placed(tensors[f"parameter/{name}"], parameter))
            self.optimizer.state[parameter] = {
                # torch counts steps on the CPU.
                "step": state["step"].clone(),
                **{key: _placed(state[key], parameter) for key in _MOMENTS},
            }

    def _read(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A parameter or an entry of its optimiser state, whole and on the CPU."""
        if self.processes.is_deepspeed:
            if key == "step":
                return zero_steps(self.optimizer)
            return _whole(read_zero(parameter, key))
        return _whole(parameter if key is None else self.optimizer.state[parameter][key])


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, all of it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and sharded as it is."""
    moved = tensor.to(like.device)
    if isinstance(like, DTensor):
        # Every process has read the whole tensor; nothing has to be sent.
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return moved
