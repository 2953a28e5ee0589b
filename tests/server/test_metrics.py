"""The guard's series: closed labels, leak arithmetic, and one entry a request."""

from __future__ import annotations

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
)
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import GuardMetrics, LoadMetrics, leaked_tokens, was_stopped


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


def manifest(created: datetime) -> Manifest:
    calibration = Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
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


def test_load_is_read_at_scrape_and_refusals_start_at_zero(registry: CollectorRegistry) -> None:
    load = {"running": 3, "waiting": 2}
    metrics = LoadMetrics(
        registry, num_running=lambda: load["running"], num_waiting=lambda: load["waiting"]
    )
    load["waiting"] = 5
    assert registry.get_sample_value("circuit_breakers_running_requests") == 3
    assert registry.get_sample_value("circuit_breakers_waiting_requests") == 5
    text = generate_latest(registry).decode()
    refused = [x for x in text.splitlines() if x.startswith("circuit_breakers_refused_requests_t")]
    assert len(refused) == 7  # the reasons that Refusal lists
    assert all(line.endswith(" 0.0") for line in refused)
    metrics.record_refusal("queue_full")
    labels = {"reason": "queue_full"}
    assert registry.get_sample_value("circuit_breakers_refused_requests_total", labels) == 1
