"""What a policy says of thresholds, probes and phases."""

from __future__ import annotations

import math

import pytest

from .test_breaker import policy


def test_a_probe_that_is_not_judged_has_no_threshold() -> None:
    some = policy(2.0, -1.0, judged=frozenset({"probe1"}))
    assert some.judges_K == (False, True)
    assert some.judged_columns.tolist() == [1]
    assert some.threshold_K.tolist() == [math.inf, -1.0]
    assert policy(2.0, -1.0).judges_K == (True, True)


@pytest.mark.parametrize(
    ("phases", "num_prompt_tokens", "expected"),
    [
        # Aggregations leave out 1 position.
        ({"prompt", "completion"}, 5, 1),
        ({"prompt"}, 5, 1),
        ({"completion"}, 5, 5),
        ({"completion"}, 0, 1),
    ],
)
def test_leading_positions_that_are_not_judged(
    phases: set[str], num_prompt_tokens: int, expected: int
) -> None:
    assert policy(1.0, phases=frozenset(phases)).num_skipped(num_prompt_tokens) == expected
