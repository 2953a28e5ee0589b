"""The losses of Representation Rerouting as pure functions of hidden states.

Source: Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers"
(arXiv 2406.04313), Algorithm 1 with the losses of section 3.2; reference implementation
GraySwanAI/circuit-breakers, src/lorra_circuit_breaker.py.

Hidden states are given per layer, adapted (adapter on) and base (adapter off, constant), together
with a mask of the tokens that count. Padding is never in a mask, so it never enters a mean.

B conversations, T tokens, D model width, N counted tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

__all__ = [
    "Coefficients",
    "coefficients",
    "mean_cosine",
    "reroute_loss",
    "retain_absolute",
    "retain_relative",
]


class Coefficients(NamedTuple):
    retain: float
    reroute: float


def coefficients(step: int, steps: int, alpha: float) -> Coefficients:
    """Loss coefficients after `step` of `steps` optimiser steps (Algorithm 1).

    c_retain = alpha * t / 2T and c_reroute = alpha * (1 - t / 2T): rerouting starts at full
    strength and ends at half, retaining goes from nothing to half. Deviation from the reference
    implementation: T is the number of steps of the recipe; there, it is
    150 whatever the run.
    """
    assert 0 <= step <= steps
    progress = step / (2 * steps)
    return Coefficients(retain=alpha * progress, reroute=alpha * (1 - progress))


def reroute_loss(adapted: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """Mean over layers and counted tokens of ReLU(cos(adapted, base)); float32 ().

    Section 3.2, L_s with the rep-orthogonality loss. Zero when every adapted representation is
    orthogonal to its base, or beyond. Deviation: by recipe only response tokens are counted, where
    the reference implementation counts user tokens, too.

    Args:
        adapted: (B, T, D) per layer.
        base: the same with the adapter off.
        mask_BT: bool, the tokens that count.
    """
    return _mean(lambda x_ND, y_ND: _cosine(x_ND, y_ND).relu(), adapted, base, mask_BT)


def retain_absolute(adapted: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """Mean over layers and counted tokens of ||adapted - base||_2; float32 ().

    Section 3.2, L_r. Deviation: padding is left out, where the reference implementation counts it
    as an error of zero.
    """
    return _mean(
        lambda x_ND, y_ND: torch.linalg.vector_norm(x_ND - y_ND, dim=-1), adapted, base, mask_BT
    )


def retain_relative(
    adapted: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor, *, smoothing: float
) -> Tensor:
    """Mean over layers and counted tokens of sqrt(e^2 + s^2) - s; float32 ().

    e = ||adapted - base|| / ||base||, s = `smoothing`. Deviation from the paper's L2 norm: the
    residual stream's norm differs by a factor of 20 and more between models, layers and tokens,
    and a norm has no slope to leave zero by small steps, which pins the adapter there.
    """

    def error(x_ND: Tensor, y_ND: Tensor) -> Tensor:
        norm_N = torch.linalg.vector_norm(y_ND, dim=-1).clamp_min(1e-6)
        squared_N = (x_ND - y_ND).square().sum(dim=-1) / norm_N.square()
        return (squared_N + smoothing**2).sqrt() - smoothing

    return _mean(error, adapted, base, mask_BT)


def mean_cosine(adapted: Sequence[Tensor], base: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """Mean over layers and counted tokens of cos(adapted, base); float32 ()."""
    return _mean(_cosine, adapted, base, mask_BT)


def _cosine(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    return cosine_similarity(x_ND, y_ND, dim=-1, eps=1e-8)


def _mean(
    measure: Callable[[Tensor, Tensor], Tensor],
    adapted: Sequence[Tensor],
    base: Sequence[Tensor],
    mask_BT: Tensor,
) -> Tensor:
    """Mean of a token-wise measure over layers and counted tokens, in float32."""
    assert len(adapted) == len(base) > 0
    assert mask_BT.dtype == torch.bool and bool(mask_BT.any())
    # bfloat16 keeps 8 bits: a cosine near 1 needs float32.
    per_layer = [
        measure(x_BTD[mask_BT].float(), y_BTD[mask_BT].float()).mean()
        for x_BTD, y_BTD in zip(adapted, base, strict=True)
    ]
    return torch.stack(per_layer).mean()
