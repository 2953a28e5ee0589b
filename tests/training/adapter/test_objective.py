"""Expected numbers are worked out by hand from the formulas of arXiv 2406.04313."""

from __future__ import annotations

import pytest
import torch

from circuit_breakers_training.adapter.objective import (
    coefficients,
    cosines,
    retain_errors_absolute,
    retain_errors_relative,
)

# Three tokens of width 2.
BASE = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
ADAPTED = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, -2.0]])


@pytest.mark.parametrize(
    ("step", "retain", "reroute"), [(0, 0.0, 10.0), (75, 2.5, 7.5), (150, 5.0, 5.0)]
)
def test_schedule_at_start_middle_and_end(step: int, retain: float, reroute: float) -> None:
    # alpha = 10, T = 150: alpha * t / 2T and alpha * (1 - t / 2T).
    assert coefficients(step, 150, 10.0) == pytest.approx((retain, reroute))


def test_cosines_of_equal_orthogonal_and_opposite_tokens() -> None:
    assert cosines(ADAPTED, BASE).tolist() == pytest.approx([1, 0, -1], abs=1e-6)


def test_retain_absolute_is_the_l2_norm() -> None:
    # sqrt(1 + 25) and 4.
    assert retain_errors_absolute(ADAPTED, BASE).tolist() == pytest.approx([0, 26**0.5, 4])


def test_retain_relative_divides_by_the_base_norm() -> None:
    # e = 0, sqrt(26) / 1, 4 / 2; sqrt(e^2 + 0.01) - 0.1.
    expected = [(e * e + 0.01) ** 0.5 - 0.1 for e in (0.0, 26**0.5, 2.0)]
    errors = retain_errors_relative(ADAPTED, BASE, smoothing=0.1)
    assert errors.tolist() == pytest.approx(expected, abs=1e-7)


def test_retain_relative_does_not_depend_on_scale() -> None:
    small = retain_errors_relative(ADAPTED, BASE, smoothing=0.1)
    large = retain_errors_relative(ADAPTED * 1000, BASE * 1000, smoothing=0.1)
    torch.testing.assert_close(large, small)


def test_errors_have_finite_gradients_where_the_adapter_does_nothing() -> None:
    for errors in (
        retain_errors_absolute,
        lambda x, y: retain_errors_relative(x, y, smoothing=0.1),
        lambda x, y: cosines(x, y).relu(),
    ):
        adapted = BASE.clone().requires_grad_()
        errors(adapted, BASE).sum().backward()
        assert adapted.grad is not None
        assert bool(adapted.grad.isfinite().all())


def test_bfloat16_states_are_compared_in_float32() -> None:
    adapted, base = ADAPTED.bfloat16(), BASE.bfloat16()
    for errors in (cosines(adapted, base), retain_errors_absolute(adapted, base)):
        assert errors.dtype == torch.float32
