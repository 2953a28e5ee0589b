"""What a policy says of thresholds, probes and phases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.guard.policy import ALL_PHASES, Policy

from ..policies.manifests import EMA, MAX, MEAN, manifest
from .test_breaker import policy


def test_a_probe_that_is_not_judged_has_no_threshold() -> None:
    some = policy(2.0, -1.0, judged=frozenset({"probe1"}))
    assert some.judges_K == (False, True)
    assert some.judged_columns.tolist() == [1]
    assert some.threshold_K.tolist() == [math.inf, -1.0]
    assert policy(2.0, -1.0).judges_K == (True, True)


@pytest.mark.parametrize(
    ("aggregation", "phases", "expected"),
    [
        (MEAN, {"completion"}, True),
        (EMA, {"completion"}, True),
        (MAX, {"completion"}, False),
        (MEAN, {"prompt"}, False),
        (EMA, {"prompt", "completion"}, False),
    ],
)
def test_a_mean_that_starts_with_the_completion_may_outscore_its_calibration(
    aggregation: Aggregation, phases: set[str], expected: bool
) -> None:
    """Logits (0, 0 | 3, 0): a mean of the completion begins at 3, of the whole it is less."""
    logit_TK = np.array([[0], [0], [3], [0]], np.float32)
    some = Policy(
        breaker="b",
        probes=manifest((2.0,), (aggregation,)).probes,
        mode="enforce",
        phases=frozenset(phases),
    )
    whole = replace(some, phases=ALL_PHASES).running_scores(2).update(logit_TK)
    assert (some.running_scores(2).update(logit_TK).max() > whole.max()) == expected
    assert some.may_outscore_calibration == expected


def test_a_probe_that_is_not_judged_outscores_nothing() -> None:
    probes = manifest((2.0, 2.0), (MEAN, MAX)).probes
    late = Policy(breaker="b", probes=probes, mode="enforce", phases=frozenset({"completion"}))
    assert late.may_outscore_calibration
    assert not replace(late, judged=frozenset({"p1"})).may_outscore_calibration


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
