"""Readiness and canaries as Prometheus sees them."""

from __future__ import annotations

import math
import time

from prometheus_client import CollectorRegistry

from circuit_breakers.metrics import HealthMetrics


def test_canaries_are_unknown_until_they_ran_and_readiness_is_read_at_scrape() -> None:
    registry = CollectorRegistry()
    reasons: list[str | None] = ["loading"]
    metrics = HealthMetrics(registry, is_ready=lambda: reasons[-1] is None, canary_interval_s=60)

    def value(name: str) -> float:
        sample = registry.get_sample_value(f"circuit_breakers_{name}")
        assert sample is not None
        return sample

    assert value("ready") == 0
    # NaN compares to nothing, so an alert on `canary_ok == 0` is quiet while the model loads.
    assert math.isnan(value("canary_ok"))
    assert math.isnan(value("canary_last_run_timestamp_seconds"))
    assert value("canary_interval_seconds") == 60
    before = time.time()
    metrics.record_canaries(passed=True)
    reasons.append(None)
    assert (value("ready"), value("canary_ok"), value("canary_failures_total")) == (1, 1, 0)
    assert before <= value("canary_last_run_timestamp_seconds") <= time.time()
    metrics.record_canaries(passed=False)
    assert (value("canary_ok"), value("canary_failures_total")) == (0, 1)
