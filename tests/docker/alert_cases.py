"""Courses of events for each alert: one on which it fires, and others that come near to it.

A value like `0+2x70` is promtool's: a counter that starts at 0 and grows by 2 a minute for 70
minutes. What is expected follows from the thresholds in helm/monitoring/rules.yaml.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CASES", "GENERATED", "POLICY", "TARGET", "Case", "Series", "requests"]

TARGET = 'instance="a:8000",job="circuit-breakers"'
POLICY = 'job="circuit-breakers",model="m",policy="p"'
TRIPS = (
    f'circuit_breakers_trips_total{{{TARGET},model="m",policy="p",phase="prompt",action="stopped"}}'
)
INFO = f'circuit_breakers_breaker_info{{{TARGET},artifact="b"}}'
UP = f"up{{{TARGET}}}"

Series = dict[str, str]


class Case(NamedTuple):
    """One alert: what makes it fire, with which labels, and what does not."""

    at: str
    fires: Series
    labels: str
    near: dict[str, Series]
    """By why it is none."""


def requests(outcome: str) -> str:
    labels = f'{TARGET},model="m",policy="p",outcome="{outcome}"'
    return f"circuit_breakers_requests_total{{{labels}}}"


def refused(reason: str) -> str:
    return f'circuit_breakers_refused_requests_total{{{TARGET},reason="{reason}"}}'


def of_target(name: str) -> str:
    return f"{name}{{{TARGET}}}"


def stays_zero(name: str) -> Case:
    """Of a counter that must stay 0: one event fires, and a restart does not put it out."""
    series = of_target(name)
    return Case(
        "20m",
        {series: "0x10 1 0x30"},
        TARGET,
        {"none": {series: "0x40"}, "long ago": {series: "1 0x40"}},
    )


GENERATED = of_target("vllm:generation_tokens_total")
SCORED = of_target("circuit_breakers_scored_tokens_total")
CANARY_OK = of_target("circuit_breakers_canary_ok")
CANARY_RUN = of_target("circuit_breakers_canary_last_run_timestamp_seconds")
CANARY_INTERVAL = of_target("circuit_breakers_canary_interval_seconds")
DRIFT = f'circuit_breakers_score_drift{{{TARGET},phase="completion"}}'
AGE = of_target("circuit_breakers_calibration_age_seconds")
SPOOLED = of_target("circuit_breakers_audit_spooled")
TRACES = of_target("circuit_breakers_traces_dropped_total")
READY = of_target("circuit_breakers_ready")
DAY_S = 86400


def first_tokens(fast: str, slow: str) -> Series:
    """Counts of requests whose first token came within 5 s, and at all: within 10 s."""
    name = "circuit_breakers_delivered_ttft_seconds_bucket"
    return {
        f'{name}{{{TARGET},le="5"}}': fast,
        f'{name}{{{TARGET},le="10"}}': slow,
        f'{name}{{{TARGET},le="+Inf"}}': slow,
    }


CASES = {
    "CircuitBreakersTripBurst": Case(
        "65m",
        {TRIPS: "0+2x70", requests("ok"): "0+8x70", requests("tripped_prompt"): "0+2x70"},
        POLICY,
        {
            "one in ten, a budget of 1 % allows 14.4 %": {
                TRIPS: "0+1x70",
                requests("ok"): "0+9x70",
                requests("tripped_prompt"): "0+1x70",
            },
            "over for ten minutes": {TRIPS: "0+4x55 220x20", requests("ok"): "0+10x70"},
            "for five minutes only": {TRIPS: "0x60 0+2x10", requests("ok"): "0+10x70"},
            "three trips of three requests": {
                TRIPS: "0x61 1 2 3x10",
                requests("tripped_prompt"): "0x61 1 2 3x10",
            },
            "rejected requests are none that trip": {
                TRIPS: "0+1x70",
                requests("ok"): "0+10x70",
                requests("rejected"): "0+90x70",
            },
        },
    ),
    "CircuitBreakersTripRateHigh": Case(
        "365m",
        {TRIPS: "0+1x370", requests("ok"): "0+10x370"},
        POLICY,
        {
            "one in twenty, a budget of 1 % allows 6 %": {
                TRIPS: "0+1x370",
                requests("ok"): "0+20x370",
            },
            "over for forty minutes": {TRIPS: "0+2x325 650x45", requests("ok"): "0+10x370"},
            "two trips in six hours": {TRIPS: "0x350 1 2x20", requests("ok"): "0x350 1 2x20"},
        },
    ),
    "CircuitBreakersUnscoredTokens": stays_zero("circuit_breakers_unscored_tokens_total"),
    "CircuitBreakersLeakedTokens": stays_zero("circuit_breakers_leaked_tokens_total"),
    "CircuitBreakersDeadProbe": Case(
        "30m",
        {GENERATED: "0+600x40", SCORED: "0+290x40"},
        TARGET,
        {
            "scores of more than half": {GENERATED: "0+600x40", SCORED: "0+310x40"},
            "no traffic": {GENERATED: "900x40", SCORED: "900x40"},
            "one long answer that ends": {GENERATED: "0x15 0+600x25", SCORED: "0x26 9000x14"},
        },
    ),
    "CircuitBreakersGuardMissing": Case(
        "40m",
        {UP: "1x50", INFO.replace("a:8000", "b:8000"): "1x50"},
        TARGET,
        {
            "the guard is there": {UP: "1x50", INFO: "1x50"},
            "still loading": {UP: "_x12 1x38"},
            "not one of ours": {UP.replace("circuit-breakers", "node"): "1x50"},
        },
    ),
    "CircuitBreakersCanaryFailing": Case(
        "12m", {CANARY_OK: "1x10 0x10"}, TARGET, {"all as they should": {CANARY_OK: "1x20"}}
    ),
    "CircuitBreakersCanaryStale": Case(
        "40m",
        {CANARY_RUN: "60x60", CANARY_INTERVAL: "300x60"},
        TARGET,
        {
            "24 minutes ago": {CANARY_RUN: "960x60", CANARY_INTERVAL: "300x60"},
            "at the start only": {CANARY_RUN: "60x60", CANARY_INTERVAL: "0x60"},
            "every hour": {CANARY_RUN: "60x60", CANARY_INTERVAL: "3600x60"},
        },
    ),
    "CircuitBreakersScoreDrift": Case(
        "40m",
        {DRIFT: "0.26x60"},
        f'{TARGET},phase="completion"',
        {
            "a quarter": {DRIFT: "0.25x60"},
            "for 20 minutes": {DRIFT: "0.1x20 0.9x40"},
        },
    ),
    "CircuitBreakersCalibrationStale": Case(
        "65m",
        {AGE: f"{181 * DAY_S}+60x70"},
        TARGET,
        {"179 days": {AGE: f"{179 * DAY_S}+60x70"}},
    ),
    "CircuitBreakersAuditDropped": stays_zero("circuit_breakers_audit_dropped_total"),
    "CircuitBreakersAuditSpoolGrowing": Case(
        "25m",
        # The database is gone, and nobody trips meanwhile.
        {SPOOLED: "3x30"},
        TARGET,
        {
            "emptied in between": {SPOOLED: "1+3x18 0 1+3x20"},
            "empty": {SPOOLED: "0x30"},
        },
    ),
    "CircuitBreakersTracesDropped": Case(
        "20m",
        {TRACES: "0x10 4x20"},
        TARGET,
        {"none": {TRACES: "0x30"}, "long ago": {TRACES: "4x30"}},
    ),
    "CircuitBreakersDown": Case(
        "10m",
        {UP: "0x20"},
        TARGET,
        {
            "up": {UP: "1x20"},
            "away for four minutes": {UP: "1x5 0x4 1x20"},
            "another job": {UP: "1x20", 'up{job="node",instance="c"}': "0x20"},
        },
    ),
    "CircuitBreakersNotReady": Case(
        "40m",
        {READY: "0x50"},
        TARGET,
        {"ready": {READY: "1x50"}, "loading for 28 minutes": {READY: "_x12 0x38"}},
    ),
    "CircuitBreakersErrors": Case(
        "15m",
        {requests("ok"): "0+9x20", requests("error"): "0+1x20"},
        'job="circuit-breakers",model="m"',
        {
            "one in twenty-five": {requests("ok"): "0+24x20", requests("error"): "0+1x20"},
            "the clients' fault": {requests("ok"): "0+9x20", requests("rejected"): "0+9x20"},
            "trips are none": {requests("ok"): "0+1x20", requests("tripped_prompt"): "0+9x20"},
        },
    ),
    "CircuitBreakersOverloaded": Case(
        "15m",
        {
            requests("ok"): "0+48x20",
            refused("queue_full"): "0+2x20",
            # Who has no key is no measure of the load.
            refused("unauthenticated"): "0+500x20",
        },
        'job="circuit-breakers",reason="queue_full"',
        {
            "one in 200": {requests("ok"): "0+199x20", refused("queue_full"): "0+1x20"},
            "a client that is too fast": {
                requests("ok"): "0+50x20",
                refused("rate_limit_exceeded"): "0+50x20",
            },
            "for a moment": {requests("ok"): "0+50x20", refused("queue_full"): "0x13 50x20"},
        },
    ),
    "CircuitBreakersFirstTokenSlow": Case(
        "20m",
        first_tokens(fast="0+97x30", slow="0+100x30"),
        'job="circuit-breakers"',
        {
            "one in 200": first_tokens(fast="0+199x30", slow="0+200x30"),
            "no requests": first_tokens(fast="97x30", slow="100x30"),
        },
    ),
}
