"""Expected numbers are worked out by hand from the formulas of arXiv 2406.04313."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuit_breakers_training.objective import (
    coefficients,
    mean_cosine,
    reroute_loss,
    retain_absolute,
    retain_relative,
)

# One conversation of four tokens, width 2; the last token is padding full of nonsense.
BASE = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [7.0, 7.0]]])
ADAPTED = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [0.0, -2.0], [-9.0, 1.0]]])
MASK = torch.tensor([[True, True, True, False]])


@pytest.mark.parametrize(
    ("step", "retain", "reroute"), [(0, 0.0, 10.0), (75, 2.5, 7.5), (150, 5.0, 5.0)]
)
def test_schedule_at_start_middle_and_end(step: int, retain: float, reroute: float) -> None:
    # alpha = 10, T = 150: alpha * t / 2T and alpha * (1 - t / 2T).
    assert coefficients(step, 150, 10.0) == pytest.approx((retain, reroute))


def test_reroute_counts_positive_cosines_only() -> None:
    # Cosines 1, 0, -1; ReLU gives 1, 0, 0.
    assert reroute_loss([ADAPTED], [BASE], MASK).item() == pytest.approx(1 / 3)
    assert mean_cosine([ADAPTED], [BASE], MASK).item() == pytest.approx(0.0, abs=1e-6)


def test_retain_absolute_is_the_l2_norm() -> None:
    # Errors 0, sqrt(1 + 25), 4.
    expected = (0 + 26**0.5 + 4) / 3
    assert retain_absolute([ADAPTED], [BASE], MASK).item() == pytest.approx(expected)


def test_retain_relative_divides_by_the_base_norm() -> None:
    # e = 0, sqrt(26) / 1, 4 / 2; sqrt(e^2 + 0.01) - 0.1.
    expected = sum((e * e + 0.01) ** 0.5 - 0.1 for e in (0.0, 26**0.5, 2.0)) / 3
    loss = retain_relative([ADAPTED], [BASE], MASK, smoothing=0.1)
    assert loss.item() == pytest.approx(expected)


def test_retain_relative_does_not_depend_on_scale() -> None:
    small = retain_relative([ADAPTED], [BASE], MASK, smoothing=0.1)
    large = retain_relative([ADAPTED * 1000], [BASE * 1000], MASK, smoothing=0.1)
    assert large.item() == pytest.approx(small.item(), rel=1e-6)


def test_losses_are_means_over_layers() -> None:
    both = reroute_loss([ADAPTED, BASE], [BASE, BASE], MASK)
    assert both.item() == pytest.approx((1 / 3 + 1) / 2)


def _losses(adapted: Tensor, base: Tensor, mask: Tensor) -> list[float]:
    return [
        reroute_loss([adapted], [base], mask).item(),
        retain_absolute([adapted], [base], mask).item(),
        retain_relative([adapted], [base], mask, smoothing=0.1).item(),
    ]


def test_padding_changes_nothing() -> None:
    padding = torch.full((1, 5, 2), 1e4)
    longer = torch.cat([MASK, torch.zeros(1, 5, dtype=torch.bool)], dim=1)
    padded = _losses(torch.cat([ADAPTED, padding], 1), torch.cat([BASE, -padding], 1), longer)
    assert padded == _losses(ADAPTED, BASE, MASK)


def test_padding_gets_no_gradient() -> None:
    adapted = ADAPTED.clone().requires_grad_()
    loss = retain_relative([adapted], [BASE], MASK, smoothing=0.1)
    loss = loss + reroute_loss([adapted], [BASE], MASK)
    loss.backward()
    assert adapted.grad is not None
    assert adapted.grad[0, 3].tolist() == [0.0, 0.0]
    assert adapted.grad[0, 1].norm() > 0


def test_losses_have_finite_gradients_where_adapter_does_nothing() -> None:
    for loss in (
        lambda x: retain_absolute([x], [BASE], MASK),
        lambda x: retain_relative([x], [BASE], MASK, smoothing=0.1),
        lambda x: reroute_loss([x], [BASE], MASK),
    ):
        adapted = BASE.clone().requires_grad_()
        loss(adapted).backward()
        assert adapted.grad is not None
        assert bool(adapted.grad.isfinite().all())


def test_bfloat16_states_are_compared_in_float32() -> None:
    loss = reroute_loss([ADAPTED.bfloat16()], [BASE.bfloat16()], MASK)
    assert loss.dtype == torch.float32
