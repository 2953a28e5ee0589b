"""The guard's series: closed labels, leak arithmetic, and one entry a request."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from circuit_breakers.artifact.manifest import (
    Aggregation,
    BaseModelSpec,
    Calibration,
    Canary,
    Manifest,
    Message,
    ProbeSpec,
    ScoreHistogram,
)
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import GuardMetrics, leaked_tokens, was_stopped
from circuit_breakers.metrics.drift import MIN_REQUESTS


def report(**changes: Any) -> GuardReport:
    values: dict[str, Any] = {
        "breaker": "b",
        "policy": "default",
        "mode": "enforce",
        "tripped": False,
        "phase": None,
        "probe": "p",
        "score": 0.5,
        "threshold": 1.0,
        "token_index": 4,
        "num_scored": 10,
    }
    return GuardReport(**(values | changes))


TRIP = {"tripped": True, "phase": "completion", "token_index": 8, "num_scored": 9}


def manifest(created: datetime, histogram: ScoreHistogram | None = None) -> Manifest:
    calibration = Calibration(
        target_fpr=0.01,
        num_conversations=300,
        num_trips=0,
        fpr_upper_bound=0.00994,
        max_tokens=64,
        histogram=None if histogram is None else {"prompt": histogram, "completion": histogram},
    )
    probe = ProbeSpec(
        name="p",
        layer=1,
        aggregation=Aggregation(kind="max"),
        threshold_logit=1.0,
        calibration=calibration,
    )
    message = (Message(role="user", content="x"),)
    return Manifest(
        schema_version=1,
        name="b",
        base_model=BaseModelSpec(
            id="m", revision=None, config_sha256="0" * 64, num_layers=4, hidden_size=8
        ),
        created=created,
        recipe={},
        data_sha256={},
        probes=(probe,),
        canaries=(
            Canary(messages=message, label="harmful"),
            Canary(messages=message, label="benign"),
        ),
        files={},
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GuardMetrics:
    metrics = GuardMetrics(registry, model="m")
    metrics.describe_breaker(
        manifest(datetime.now(UTC) - timedelta(hours=1)), "d" * 64, "default", "enforce"
    )
    return metrics


def test_every_combination_of_labels_starts_at_zero(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    text = generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    requests = [x for x in lines if x.startswith("circuit_breakers_requests_total")]
    trips = [x for x in lines if x.startswith("circuit_breakers_trips_total")]
    assert (len(requests), len(trips)) == (6, 4)  # outcomes; two phases times two actions
    assert all(line.endswith(" 0.0") for line in requests + trips)


def test_a_trip_is_counted_by_phase_and_action(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    metrics.record_trips(
        [
            report(),
            report(**TRIP),
            report(**TRIP | {"mode": "observe", "phase": "prompt", "token_index": 3}),
        ]
    )

    def trips(phase: str, action: str) -> float | None:
        labels = {"model": "m", "policy": "default", "phase": phase, "action": action}
        return registry.get_sample_value("circuit_breakers_trips_total", labels)

    assert trips("completion", "stopped") == 1
    assert trips("prompt", "observed") == 1
    assert trips("completion", "observed") == 0
    assert registry.get_sample_value("circuit_breakers_trip_token_index_sum") == 8 + 3


def test_calibration_age_is_computed_at_scrape(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    age = registry.get_sample_value("circuit_breakers_calibration_age_seconds")
    assert age == pytest.approx(3600, abs=30)


def test_breaker_info_names_the_live_breaker_only(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    metrics.describe_breaker(manifest(datetime.now(UTC)), "e" * 64, "default", "observe")
    text = generate_latest(registry).decode()
    lines = [x for x in text.splitlines() if x.startswith("circuit_breakers_breaker_info{")]
    assert len(lines) == 1
    assert 'mode="observe"' in lines[0] and f'digest="{"e" * 64}"' in lines[0]


@pytest.mark.parametrize(
    ("reports", "num_prompt", "num_completion", "leaked"),
    [
        # 5 prompt tokens, trip at position 8: positions 5, 6 and 7 may be delivered.
        ([report(**TRIP)], 5, 3, 0),
        ([report(**TRIP)], 5, 4, 1),
        # Not stopped, 10 scored: 5 completion tokens are covered.
        ([report()], 5, 5, 0),
        ([report()], 5, 7, 2),
        # In observe mode a trip stops nothing, so everything scored may leave.
        ([report(**TRIP | {"mode": "observe", "num_scored": 12})], 5, 7, 0),
        # Nor does one that came before a token without a score, which stops at itself.
        ([report(**TRIP | {"mode": "observe", "num_scored": 12, "num_unscored": 1})], 5, 7, 0),
        ([report(**TRIP | {"mode": "observe", "num_scored": 12, "num_unscored": 1})], 5, 8, 1),
        # Two choices of one prompt of 5 tokens: 3 + 5 tokens are covered.
        ([report(**TRIP), report()], 10, 8, 0),
        ([report(**TRIP), report()], 10, 9, 1),
        ([], 0, 0, 0),
    ],
)
def test_leaked_tokens_are_those_no_verdict_covers(
    reports: list[GuardReport], num_prompt: int, num_completion: int, leaked: int
) -> None:
    assert leaked_tokens(reports, num_prompt, num_completion) == leaked


def test_an_unscored_token_stops_in_observe_mode_too() -> None:
    observed = report(**TRIP | {"mode": "observe"})
    assert not was_stopped(observed)
    assert was_stopped(report(**TRIP | {"mode": "observe", "num_unscored": 1}))


def drift(registry: CollectorRegistry, phase: str, name: str = "score_drift") -> float | None:
    return registry.get_sample_value(f"circuit_breakers_{name}", {"phase": phase})


def test_drift_is_absent_for_a_breaker_without_a_histogram(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    metrics.record_unsuspicious([{"prompt": {"p": 0.5}}])
    assert drift(registry, "prompt") is None
    assert drift(registry, "prompt", "score_drift_requests") is None


def test_drift_waits_for_enough_answers_and_survives_a_reload(registry: CollectorRegistry) -> None:
    metrics = GuardMetrics(registry, model="m")
    calibrated = manifest(datetime.now(UTC), ScoreHistogram(edges=(0.0,), counts=(150, 150)))
    metrics.describe_breaker(calibrated, "d" * 64, "default", "enforce")
    answers: list[dict[Any, dict[str, float]]] = [{"prompt": {"p": -1.0}}, {"prompt": {"p": 1.0}}]
    metrics.record_unsuspicious(answers * (MIN_REQUESTS // 2 - 1))
    assert math.isnan(drift(registry, "prompt") or 0)
    metrics.describe_breaker(calibrated, "d" * 64, "default", "observe")
    metrics.record_unsuspicious(answers)
    assert drift(registry, "prompt", "score_drift_requests") == MIN_REQUESTS
    # Half of them below 0 and half from 0 on, as calibrated.
    assert drift(registry, "prompt") == 0
    assert drift(registry, "completion", "score_drift_requests") == 0
    assert math.isnan(drift(registry, "completion") or 0)
    # Another breaker's scores say nothing of this one's.
    metrics.describe_breaker(calibrated, "e" * 64, "default", "observe")
    assert drift(registry, "prompt", "score_drift_requests") == 0


def test_drift_is_that_of_the_probe_that_moved_most(registry: CollectorRegistry) -> None:
    metrics = GuardMetrics(registry, model="m")
    one = manifest(datetime.now(UTC), ScoreHistogram(edges=(0.0,), counts=(150, 150)))
    (probe,) = one.probes
    two = one.model_copy(update={"probes": (probe, probe.model_copy(update={"name": "q"}))})
    metrics.describe_breaker(two, "d" * 64, "default", "enforce")
    metrics.record_unsuspicious(
        {"prompt": {"p": 1.0 if i % 2 else -1.0, "q": 1.0}} for i in range(MIN_REQUESTS)
    )
    # q: shares 1/2 and 1/2 expected, 0.5/201 and 200.5/201 observed (0.5 added to each of 2 bins).
    low, high = 0.5 / 201, 200.5 / 201
    expected = (low - 0.5) * math.log(low / 0.5) + (high - 0.5) * math.log(high / 0.5)
    assert drift(registry, "prompt") == pytest.approx(expected)


def test_scored_tokens_are_counted_for_the_model(
    registry: CollectorRegistry, metrics: GuardMetrics
) -> None:
    metrics.record_scored(12)
    metrics.record_scored(3)
    labels = {"model": "m"}
    assert registry.get_sample_value("circuit_breakers_scored_tokens_total", labels) == 15
