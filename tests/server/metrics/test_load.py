"""What the limits do: the load at each scrape, and every refusal by its reason."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from circuit_breakers.metrics import LoadMetrics


def test_load_is_read_at_scrape_and_refusals_start_at_zero() -> None:
    registry = CollectorRegistry()
    load = {"running": 3, "waiting": 2}
    metrics = LoadMetrics(
        registry, num_running=lambda: load["running"], num_waiting=lambda: load["waiting"]
    )
    load["waiting"] = 5
    assert registry.get_sample_value("circuit_breakers_running_requests") == 3
    assert registry.get_sample_value("circuit_breakers_waiting_requests") == 5
    text = generate_latest(registry).decode()
    refused = [x for x in text.splitlines() if x.startswith("circuit_breakers_refused_requests_t")]
    assert len(refused) == 10  # the reasons that Refusal lists
    assert all(line.endswith(" 0.0") for line in refused)
    metrics.record_refusal("queue_full")
    labels = {"reason": "queue_full"}
    assert registry.get_sample_value("circuit_breakers_refused_requests_total", labels) == 1
