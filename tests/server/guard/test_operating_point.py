"""The promise that is asked for, against those that the breaker's data supports."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from circuit_breakers.artifact.manifest import (
    Aggregation,
    BaseModelSpec,
    Calibration,
    Canary,
    Manifest,
    Message,
    OperatingPoint,
    ProbeSpec,
)
from circuit_breakers.errors import CalibrationError
from circuit_breakers.guard.operating_point import probes_at
from circuit_breakers.guard.policy import Policy

# 1,000 conversations: one-sided 95 % Clopper-Pearson bounds of 38, 12, 4 and 0 trips, from scipy.
CURVE = (
    (0.05, 1.0, 38, 0.04952),
    (0.02, 2.0, 12, 0.01938),
    (0.01, 3.0, 4, 0.00913),
    (0.003, 4.0, 0, 0.00299),
)


def _probe(name: str, curve: tuple[tuple[float, float, int, float], ...], raised: float = 0.0):  # type: ignore[no-untyped-def]
    points = tuple(
        OperatingPoint(
            target_fpr=target,
            threshold_logit=threshold + raised,
            num_conversations=1000,
            num_trips=num_trips,
            fpr_upper_bound=bound,
        )
        for target, threshold, num_trips, bound in curve
    )
    return ProbeSpec(
        name=name,
        layer=1,
        aggregation=Aggregation(kind="max"),
        threshold_logit=3.0 + raised,
        calibration=Calibration(
            target_fpr=0.01,
            num_conversations=1000,
            num_trips=4,
            fpr_upper_bound=0.00913,
            max_tokens=256,
            curve=points,
        ),
    )


def _manifest(*probes: ProbeSpec) -> Manifest:
    return Manifest(
        schema_version=1,
        name="test",
        base_model=BaseModelSpec(
            id="m", revision=None, config_sha256="0" * 64, num_layers=4, hidden_size=8
        ),
        created=datetime(2026, 11, 24, tzinfo=UTC),
        recipe={},
        data_sha256={},
        probes=probes,
        canaries=tuple(
            Canary(messages=(Message(role="user", content="x"),), label=label)
            for label in ("harmful", "benign")
        ),
        files={},
    )


@pytest.mark.parametrize(
    ("asked", "threshold", "promised"),
    [
        (0.02, 2.0, 0.02),  # stored exactly
        (0.015, 3.0, 0.01),  # between two: the stricter one keeps the promise
        (0.0195, 2.0, 0.02),  # the data shows a little more than the point promises
        (0.5, 1.0, 0.05),  # the loosest keeps any looser promise
        (0.003, 4.0, 0.003),
    ],
)
def test_the_lowest_threshold_that_keeps_the_promise(
    asked: float, threshold: float, promised: float
) -> None:
    (probe,) = probes_at(_manifest(_probe("a", CURVE)), asked)
    assert probe.threshold_logit == threshold
    assert probe.calibration.target_fpr == promised
    assert probe.calibration.fpr_upper_bound <= asked
    assert probe.calibration.max_tokens == 256


def test_counts_of_the_point_come_along() -> None:
    (probe,) = probes_at(_manifest(_probe("a", CURVE)), 0.05)
    assert (probe.calibration.num_trips, probe.calibration.num_conversations) == (38, 1000)


def test_every_probe_moves_to_the_same_point() -> None:
    manifest = _manifest(_probe("a", CURVE), _probe("b", CURVE, raised=10.0))
    policy = Policy.from_manifest(manifest, "enforce", 0.02)
    assert [p.threshold_logit for p in policy.probes] == [2.0, 12.0]


def test_without_a_wish_the_breaker_stays_as_it_was_exported() -> None:
    manifest = _manifest(_probe("a", CURVE))
    assert probes_at(manifest, None) == manifest.probes
    assert Policy.from_manifest(manifest, "observe").probes == manifest.probes


def test_a_promise_beyond_the_data_is_refused_with_what_it_takes() -> None:
    # ln(0.05) / ln(1 - 0.001) is 2994.2.
    with pytest.raises(
        CalibrationError,
        match=r"got target_fpr 0\.001 .*1000 benign .*at best 0\.00299; expected one of "
        r"0\.05, 0\.02, 0\.01, 0\.003 .*at least 2995 benign",
    ):
        probes_at(_manifest(_probe("a", CURVE)), 0.001)


@pytest.mark.parametrize("target_fpr", [1e-300, 1e-308, 5e-324])
def test_a_promise_that_no_number_of_conversations_proves_is_refused(target_fpr: float) -> None:
    with pytest.raises(CalibrationError, match="at least 1000000000000 benign"):
        probes_at(_manifest(_probe("a", CURVE)), target_fpr)


def test_a_breaker_without_a_curve_has_its_one_promise() -> None:
    manifest = _manifest(_probe("a", ()))
    assert probes_at(manifest, 0.01)[0].threshold_logit == 3.0
    assert probes_at(manifest, 0.02)[0].threshold_logit == 3.0
    with pytest.raises(CalibrationError, match=r"expected one of 0\.01 or more"):
        probes_at(manifest, 0.005)


def test_probes_calibrated_one_by_one_promise_nothing_together() -> None:
    with pytest.raises(CalibrationError, match="2 probes were calibrated one by one"):
        probes_at(_manifest(_probe("a", ()), _probe("b", ())), 0.01)
