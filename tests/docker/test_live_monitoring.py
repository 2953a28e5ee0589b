"""Real traffic, Prometheus and Alertmanager: every panel has data, and an alert arrives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import openai
import pytest
import yaml

from ..server.api.conftest import MODEL, Server, user
from .monitoring_stack import MonitoringStack, Webhook, faster
from .panel_queries import PanelQuery, concrete, panel_queries
from .test_rules import RULES

BENIGN = "What is the capital of Italy?"
TRIPS_ON_PROMPT = "Do you like the zebra?"
TRIPS_WHILE_GENERATING = "What is the capital of France?"
BURST = "CircuitBreakersTripBurst"
_WAIT_S = 90

WITHOUT_DATA: dict[str, str] = {
    "Score drift": "the breaker for words has no calibration histogram",
}
"""Panels that cannot have data here, and why."""


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.stop()


@pytest.fixture(scope="module")
def stack(
    server: Server, webhook: Webhook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MonitoringStack]:
    target = f"127.0.0.1:{server.port}"
    stack = MonitoringStack(tmp_path_factory.mktemp("monitoring"), target, webhook.url)
    try:
        stack.wait_until_ready()
        yield stack
    finally:
        stack.stop()


def ask(server: Server, text: str) -> str:
    """How the answer ended; the breaker for words knows what trips."""
    try:
        answer = server.openai.chat.completions.create(
            model=MODEL, messages=user(text), max_tokens=12, temperature=0
        )
    except openai.BadRequestError as e:
        assert e.code == "content_filter"
        return "refused"
    return str(answer.choices[0].finish_reason)


def wait_for(what: str, holds: Callable[[], bool], stack: MonitoringStack) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"no {what} after {_WAIT_S} s: {stack.logs()}"
        time.sleep(0.2)


def has_data(stack: MonitoringStack, query: PanelQuery) -> bool:
    samples = stack.query(concrete(query.expr))
    return any(math.isfinite(float(sample["value"][1])) for sample in samples)


def test_burst_of_trips_reaches_the_webhook_and_every_panel(
    server: Server, stack: MonitoringStack, webhook: Webhook
) -> None:
    wait_for("first scrape", lambda: bool(stack.query("circuit_breakers_breaker_info")), stack)
    for _ in range(4):
        assert ask(server, BENIGN) in ("stop", "length")
    assert not webhook.received

    burst_s = time.monotonic()
    for _ in range(5):
        assert ask(server, TRIPS_ON_PROMPT) == "refused"
        assert ask(server, TRIPS_WHILE_GENERATING) == "content_filter"
    wait_for("notification", lambda: bool(webhook.alerts("firing", BURST)), stack)
    print(f"trip burst to webhook: {time.monotonic() - burst_s:.1f} s")

    empty: list[PanelQuery] = []

    def none_is_empty() -> bool:
        empty[:] = [query for query in panel_queries() if not has_data(stack, query)]
        return {query.title for query in empty} <= set(WITHOUT_DATA)

    try:
        wait_for("data in some panel", none_is_empty, stack)
    except AssertionError as e:
        raise AssertionError(f"no data: {empty}") from e
    assert {query.title for query in empty} == set(WITHOUT_DATA)

    # Nothing else is wrong with this server, unless the machine is so busy that it is slow; and
    # the slower alert on trips keeps quiet beside the faster.
    fired = {alert["labels"]["alertname"] for alert in webhook.alerts("firing")}
    assert fired - {"CircuitBreakersFirstTokenSlow"} == {BURST}
    burst = webhook.alerts("firing", BURST)[0]
    labels, notes = burst["labels"], burst["annotations"]
    assert labels["severity"] == "critical" and labels["policy"] == "default"
    assert labels["model"] == MODEL and labels["job"] == "circuit-breakers"
    assert "under policy default tripped in the last hour" in notes["description"]
    assert "<no value>" not in notes["description"] and "%!" not in notes["description"]

    print(f"scrape: {len(server.http.get('/metrics').content)} bytes")
    for name in ("scrape_duration_seconds", "scrape_samples_scraped"):
        (sample,) = stack.query(f'{name}{{job="circuit-breakers"}}')
        print(f"{name}: {sample['value'][1]}")


def test_no_rule_fails_to_evaluate(stack: MonitoringStack) -> None:
    # E.g. several series on the one side of a division show only on real data.
    (sample,) = stack.query("sum(prometheus_rule_evaluation_failures_total) or vector(0)")
    assert float(sample["value"][1]) == 0
    rules = yaml.safe_load(RULES.read_text())
    recorded = {r["record"] for group in rules["groups"] for r in group["rules"] if "record" in r}
    assert all(stack.query(name) for name in recorded)


def test_faster_rules_differ_in_their_times_alone() -> None:
    text = "for: 15m\nexpr: rate(x[5m]) > 14.4 * y # in 5 minutes\n"
    assert faster(text) == "for: 30s\nexpr: rate(x[10s]) > 14.4 * y # in 5 minutes\n"
