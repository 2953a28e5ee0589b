"""The errors that Representation Rerouting trains on, as pure functions of hidden states.

Source: Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers"
(arXiv 2406.04313), Algorithm 1 with the losses of section 3.2; reference implementation
GraySwanAI/circuit-breakers, src/lorra_circuit_breaker.py.

Hidden states of one layer are given token by token, adapted (adapter on) and base (adapter off,
constant); padding is never among them, so it never enters a mean. Errors are summed and divided in
batch_losses.py, over tokens of all parts of a step alike.

B conversations, T tokens, D model width, N tokens
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

__all__ = [
    "Coefficients",
    "coefficients",
    "cosines",
    "retain_errors_absolute",
    "retain_errors_relative",
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


def cosines(adapted_ND: Tensor, base_ND: Tensor) -> Tensor:
    """cos(adapted, base) of each token; float32 (N,).

    The reroute loss is the mean of its ReLU over target layers and counted tokens: section 3.2,
    L_s with the rep-orthogonality loss. It is zero when every adapted representation is orthogonal
    to its base, or beyond. Deviation: by recipe only response tokens are counted, where the
    reference implementation counts user tokens, too.
    """
    # bfloat16 keeps 8 bits: a cosine near 1 needs float32.
    return cosine_similarity(adapted_ND.float(), base_ND.float(), dim=-1, eps=1e-8)


def retain_errors_absolute(adapted_ND: Tensor, base_ND: Tensor) -> Tensor:
    """||adapted - base||_2 of each token; float32 (N,).

    Section 3.2, L_r, whose mean over layers and counted tokens is the retain loss. Deviation:
    padding is left out, where the reference implementation counts it as an error of zero.
    """
    return torch.linalg.vector_norm(adapted_ND.float() - base_ND.float(), dim=-1)


def retain_errors_relative(adapted_ND: Tensor, base_ND: Tensor, *, smoothing: float) -> Tensor:
    """sqrt(e^2 + s^2) - s of each token; float32 (N,).

    e = ||adapted - base|| / ||base||, s = `smoothing`. Deviation from the paper's L2 norm: the
    residual stream's norm differs by a factor of 20 and more between models, layers and tokens,
    and a norm has no slope to leave zero by small steps, which pins the adapter there.
    """
    base_ND = base_ND.float()
    norm_N = torch.linalg.vector_norm(base_ND, dim=-1).clamp_min(1e-6)
    squared_N = (adapted_ND.float() - base_ND).square().sum(dim=-1) / norm_N.square()
    return (squared_N + smoothing**2).sqrt() - smoothing
