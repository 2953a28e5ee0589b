"""Parameters and optimiser state that DeepSpeed's ZeRO spreads over processes, read and set whole.

DeepSpeed keeps them in flat float32 partitions of its own; its `safe_*` functions find a
parameter's piece. All functions here are collective operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breakers_training.recipes.config import Recipe

__all__ = ["configure_zero", "read_zero", "set_zero", "set_zero_steps", "zero_steps"]


def configure_zero(plugin: Any, recipe: Recipe) -> None:
    """Give accelerate's DeepSpeed plugin what the recipe decides."""
    plugin.deepspeed_config |= {
        # A number that DeepSpeed only computes batch sizes from, which it does not use here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
    }


def read_zero(parameter: nn.Parameter, key: str | None = None) -> Tensor:
    """The float32 parameter, or the entry `key` of its optimiser state."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key is None:
        tensor = safe_get_full_fp32_param(parameter)
    else:
        tensor = safe_get_full_optimizer_state(parameter, key)
    assert tensor is not None
    return tensor.float().view(_shape(parameter))


def set_zero(parameter: nn.Parameter, tensor: Tensor, key: str | None = None) -> None:
    """Replace what `read_zero` reads."""
    import deepspeed
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    # By piece: DeepSpeed's function for whole tensors takes no size that its ranks do not divide.
    size = safe_get_local_fp32_param(parameter).numel()
    ranks = deepspeed.comm.get_world_size()
    flat = torch.zeros(size * ranks, device=parameter.device)
    flat[: tensor.numel()] = tensor.flatten().to(parameter.device)
    piece = flat.view(ranks, size)[deepspeed.comm.get_rank()]
    if key is not None:
        safe_set_local_optimizer_state(parameter, piece, key)
        return
    safe_set_local_fp32_param(parameter, piece)
    # The copy that the model computes with would change with the next step only.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(tensor)


def zero_steps(optimizer: Any) -> Tensor:
    """Number of steps that the optimiser corrects its moments for."""
    # A copy: the counter goes on.
    return torch.tensor(float(next(_counters(optimizer))["step"]))


def set_zero_steps(optimizer: Any, steps: Tensor) -> None:
    """Replace what `zero_steps` reads, and allocate the moments that a first step would."""
    zero = optimizer.optimizer
    for partition in zero.fp32_partitioned_groups_flat:
        state = zero.optimizer.state[partition]
        if not state:
            state |= {"step": torch.tensor(0.0)}
            state |= {key: torch.zeros_like(partition) for key in ("exp_avg", "exp_avg_sq")}
    for counter in _counters(optimizer):
        kind = type(counter["step"])
        counter["step"] = steps.clone() if issubclass(kind, Tensor) else kind(steps.item())


def _counters(optimizer: Any) -> Iterator[dict[str, Any]]:
    """Where the innermost optimiser counts steps: by parameter, or by group (FusedAdam)."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for counter in (*optimizer.state.values(), *optimizer.param_groups):
        if "step" in counter:
            yield counter


def _shape(parameter: Any) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
