"""A request's policy arrives as it was sent, and a broken one is none."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers.artifact.manifest import Aggregation, ProbeSpec
from circuit_breakers.engine.request_policy import OwnArgs, RequestPolicies, own_args
from circuit_breakers.guard.policy import Policy

from .conftest import CALIBRATION

DEFAULT = Policy(
    breaker="b",
    probes=tuple(
        ProbeSpec(
            name=f"probe{k}",
            layer=k,
            aggregation=Aggregation(kind="max"),
            threshold_logit=float(k),
            calibration=CALIBRATION,
        )
        for k in range(3)
    ),
    mode="enforce",
)
GOOD: dict[str, Any] = {"mode": "observe", "thresholds": [1.0, None, 2.5], "phases": ["prompt"]}


def request(extra_args: Any) -> Any:
    return SimpleNamespace(
        request_id="r", sampling_params=SimpleNamespace(extra_args=extra_args, n=1)
    )


def wired(policy: Policy) -> Any:
    """The extra_args as the engine core gets them."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(own_args(policy)))


@given(
    st.lists(st.none() | st.floats(-1e6, 1e6), min_size=3, max_size=3).filter(any),
    st.sampled_from(["observe", "enforce"]),
    st.sets(st.sampled_from(["prompt", "completion"]), min_size=1),
)
def test_both_sides_judge_by_the_same_values(
    thresholds: list[float | None], mode: Any, phases: set[Any]
) -> None:
    sent = dataclasses.replace(
        DEFAULT,
        mode=mode,
        name="strict",
        phases=frozenset(phases),
        probes=tuple(
            p if t is None else p.model_copy(update={"threshold_logit": t})
            for p, t in zip(DEFAULT.probes, thresholds, strict=True)
        ),
        judged=frozenset(f"probe{k}" for k, t in enumerate(thresholds) if t is not None),
    )
    got = RequestPolicies().of(request(wired(sent)), DEFAULT)
    assert got.threshold_K.tolist() == sent.threshold_K.tolist()
    assert (got.mode, got.phases, got.judges_K) == (sent.mode, sent.phases, sent.judges_K)
    assert [p.aggregation for p in got.probes] == [p.aggregation for p in sent.probes]


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_a_request_without_a_policy_gets_the_engines_own(extra_args: Any) -> None:
    assert RequestPolicies().of(request(extra_args), DEFAULT) is DEFAULT


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "observe",
        {},
        GOOD | {"mode": "off"},
        GOOD | {"mode": ["observe"]},
        GOOD | {"thresholds": [1.0, 2.0]},
        GOOD | {"thresholds": [None, None, None]},
        GOOD | {"thresholds": [1.0, None, float("nan")]},
        GOOD | {"thresholds": [1.0, None, float("inf")]},
        GOOD | {"thresholds": [1.0, None, "2"]},
        GOOD | {"thresholds": [1.0, None, True]},
        GOOD | {"thresholds": None},
        GOOD | {"phases": []},
        GOOD | {"phases": ["prompt", "reasoning"]},
        GOOD | {"phases": [["prompt"]]},
        GOOD | {"phases": "prompt"},
        GOOD | {"extra": 1},
        {name: GOOD[name] for name in ("mode", "phases")},
    ],
    ids=lambda v: json.dumps(v)[:40],
)
def test_a_malformed_policy_is_none_at_all(values: Any, caplog: pytest.LogCaptureFixture) -> None:
    policies = RequestPolicies()
    assert policies.of(request({"circuit_breakers": GOOD}), DEFAULT).mode == "observe"
    with caplog.at_level(logging.ERROR, logger="vllm.circuit_breakers"):
        assert policies.of(request({"circuit_breakers": values}), DEFAULT) is DEFAULT


def test_equal_policies_are_one_object_until_the_default_changes() -> None:
    policies = RequestPolicies()
    first = policies.of(request({"circuit_breakers": GOOD}), DEFAULT)
    assert policies.of(request({"circuit_breakers": dict(GOOD)}), DEFAULT) is first
    other = dataclasses.replace(DEFAULT, breaker="c")
    assert policies.of(request({"circuit_breakers": GOOD}), other).breaker == "c"


def test_tightened_policies_do_not_pile_up() -> None:
    policies = RequestPolicies()
    for number in range(1000):
        values = GOOD | {"thresholds": [float(number), None, None]}
        policies.of(request({"circuit_breakers": values}), DEFAULT)
    assert len(policies._known) == 256


def test_own_arguments_are_of_a_type_that_json_cannot_make() -> None:
    assert type(own_args(DEFAULT)) is OwnArgs
    assert type(json.loads(json.dumps(own_args(DEFAULT)))) is dict
