"""Nothing that a request says makes its policy looser: neither by value nor by verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_breakers.errors import PolicyRequestError
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.served_policy import ServedPolicy
from circuit_breakers.policies.tightening import loosenings, parse_guard_request, tighten

from .manifests import EMA, MAX, MEAN, manifest

MANIFEST = manifest((4.0, 6.0, 5.0), (MAX, EMA, MEAN))
PROBES = ("p0", "p1", "p2")
PHASES = ("prompt", "completion")
OWN = ServedPolicy(policy=Policy.from_manifest(MANIFEST, "enforce"))


def changed(served: ServedPolicy = OWN, action: Any = None, **policy: Any) -> ServedPolicy:
    if (values := policy.pop("thresholds", None)) is not None:
        policy["probes"] = tuple(
            probe.model_copy(update={"threshold_logit": value})
            for probe, value in zip(served.policy.probes, values, strict=True)
        )
    policy = {"name": "other"} | policy
    return dataclasses.replace(
        served,
        policy=dataclasses.replace(served.policy, **policy),
        action=action or served.action,
    )


def asked(value: Any, own: ServedPolicy = OWN, **named: ServedPolicy) -> ServedPolicy:
    return tighten(own, parse_guard_request(value), named, MANIFEST)


THRESHOLDS = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0])
SERVED = st.builds(
    lambda name, thresholds, mode, phases, judged, action: changed(
        action=action,
        name=name,
        thresholds=thresholds,
        mode=mode,
        phases=frozenset(phases),
        judged=None if judged is None else frozenset(judged),
    ),
    st.sampled_from(["a", "b"]),
    st.tuples(THRESHOLDS, THRESHOLDS, THRESHOLDS),
    st.sampled_from(["observe", "enforce"]),
    st.sets(st.sampled_from(PHASES), min_size=1),
    st.none() | st.sets(st.sampled_from(PROBES), min_size=1, max_size=2),
    st.sampled_from(["stop", "refuse", "error"]),
)
VALUES = (
    st.none()
    | st.booleans()
    | st.floats()
    | THRESHOLDS
    | st.integers()
    | st.sampled_from(["a", "b", "c", "default", "observe", "enforce", ""])
    | st.dictionaries(st.sampled_from([*PROBES, "p9"]), THRESHOLDS | st.floats(), max_size=3)
    | st.lists(st.integers(), max_size=2)
)
FIELDS = st.dictionaries(
    st.sampled_from(["policy", "mode", "target_fpr", "threshold"]), VALUES, max_size=4
) | st.dictionaries(st.text(max_size=9), VALUES, max_size=2)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(["a", "b"]),
        "mode": st.sampled_from(["observe", "enforce"]),
        "target_fpr": st.sampled_from([0.01, 0.02, 0.05, 0.5]),
        "threshold": THRESHOLDS | st.dictionaries(st.sampled_from(PROBES), THRESHOLDS),
    },
)
STREAMS = st.tuples(
    st.lists(st.tuples(*[st.sampled_from([-3.0, 0.5, 2.5, 4.0])] * 3), min_size=3, max_size=6),
    st.integers(1, 3),
)


def first_stop(served: ServedPolicy, stream: tuple[list[tuple[float, ...]], int]) -> float:
    """The position where a stream is stopped; infinite where it is not."""
    rows, num_prompt_tokens = stream
    trip = StreamBreaker(served.policy, num_prompt_tokens).update(np.array(rows, np.float32))
    stops = trip is not None and served.policy.mode == "enforce"
    return trip.token_index if trip is not None and stops else np.inf


@settings(max_examples=400, deadline=None)
@given(SERVED, st.dictionaries(st.sampled_from("ab"), SERVED), LIKELY | FIELDS | VALUES, STREAMS)
def test_no_value_of_a_request_makes_a_looser_policy(
    own: ServedPolicy, named: dict[str, ServedPolicy], value: Any, stream: Any
) -> None:
    try:
        effective = asked(value, own, **named)
    except PolicyRequestError:
        return
    assert first_stop(effective, stream) <= first_stop(own, stream), "it lets more through"
    mine, other = own.policy, effective.policy
    assert mine.mode == "observe" or other.mode == "enforce"
    assert mine.phases <= other.phases
    assert (other.threshold_K <= mine.threshold_K).all()
    withholds = ["stop", "refuse", "error"]
    assert withholds.index(effective.action) >= withholds.index(own.action)


@settings(max_examples=400, deadline=None)
@given(SERVED, st.tuples(*[st.sampled_from([0.0, 0.0, -1.0])] * 3), st.booleans(), STREAMS)
def test_a_policy_without_loosenings_stops_no_later(
    own: ServedPolicy, steps: tuple[float, ...], whole: bool, stream: Any
) -> None:
    """Of policies that are close to each other, as far apart ones are looser in some respect."""
    thresholds = [
        p.threshold_logit + step for p, step in zip(own.policy.probes, steps, strict=True)
    ]
    own = changed(own, mode="enforce")
    other = changed(own, thresholds=thresholds)
    if whole:
        other = changed(other, phases=frozenset(PHASES))
    if not loosenings(own, other):
        assert first_stop(other, stream) <= first_stop(own, stream)


def test_what_is_as_strict_is_allowed() -> None:
    assert asked({}) == OWN
    assert asked({"policy": OWN.name, "mode": "enforce"}) == OWN
    assert asked({"threshold": 3.5}).policy.threshold_K.tolist() == [3.5] * 3
    assert asked({"threshold": {"p1": 1}}).policy.threshold_K.tolist() == [4, 1, 5]
    # The promise of 5 % has thresholds lower by 1: more false trips, and more true ones.
    assert asked({"target_fpr": 0.05}).policy.threshold_K.tolist() == [3, 5, 4]
    strict = changed(thresholds=(1, 1, 1), name="strict")
    assert asked({"policy": "strict"}, strict=strict) == strict
    assert asked({"policy": "strict", "threshold": 0.5}, strict=strict).name == "strict"


def test_observe_may_become_enforce() -> None:
    observing = changed(mode="observe")
    assert asked({"mode": "enforce"}, observing).policy.mode == "enforce"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"mode": "observe"}, "mode observe would stop nothing, yours is enforce"),
        ({"threshold": 5}, "threshold 5 of probe p0 is above yours, 4"),
        ({"threshold": {"p2": 9}}, "threshold 9 of probe p2 is above yours, 5"),
        ({"policy": "lax"}, "threshold 5 of probe p0.*probe p1 would not be judged"),
        ({"policy": "half"}, "phase prompt would not be judged"),
        ({"policy": "nobody"}, "policy 'nobody', which the server does not have"),
        ({"target_fpr": 0.001}, "got target_fpr 0.001"),
        ({"threshold": {"p9": 1}}, "got probe 'p9', expected one that is judged: p0, p1, p2"),
        ({"threshold": 1, "target_fpr": 0.05}, "got target_fpr and threshold, expected one"),
        ({"action": "stop"}, r"guard\.action: extra inputs"),
        ({"threshold": "1"}, r"guard\.threshold: "),
        ({"threshold": True}, r"guard\.threshold: "),
        ({"threshold": float("nan")}, r"guard\.threshold: "),
        ({"mode": "off"}, r"guard\.mode: "),
        ("strict", "guard: .*expected an object with policy"),
    ],
)
def test_what_would_loosen_is_named(value: Any, message: str) -> None:
    named = {
        "lax": changed(thresholds=(5, 1, 1), judged=frozenset({"p0", "p2"}), name="lax"),
        "half": changed(phases=frozenset({"completion"}), name="half"),
    }
    with pytest.raises(PolicyRequestError, match=message):
        asked(value, **named)


def test_a_promise_cannot_be_asked_for_where_means_start_with_the_completion() -> None:
    late = changed(phases=frozenset({"completion"}), name="late")
    with pytest.raises(PolicyRequestError, match="policy 'late', whose means start with the"):
        asked({"target_fpr": 0.05}, late)


def test_text_that_is_withheld_stays_withheld() -> None:
    refusing = changed(action="refuse")
    strict = changed(action="stop", thresholds=(1, 1, 1), name="strict")
    with pytest.raises(PolicyRequestError, match="action stop would show the text"):
        asked({"policy": "strict"}, refusing, strict=strict)
    assert asked({"threshold": 1}, refusing).action == "refuse"
    # A stream of messages shows under `refuse` what `error` withholds.
    failing = changed(action="error")
    refused = changed(action="refuse", thresholds=(1, 1, 1), name="refused")
    with pytest.raises(PolicyRequestError, match="action refuse would show the text"):
        asked({"policy": "refused"}, failing, refused=refused)
    assert asked({"policy": "failing"}, refusing, failing=failing).action == "error"


def test_a_mean_that_the_prompt_would_thin_out_is_looser() -> None:
    """Scores (0, 0 | 4, 4): the mean of the completion is 4, that of the whole is lower."""
    completion = frozenset({"completion"})
    own = changed(phases=completion, thresholds=(9, 9, 4), name="own")
    both = changed(thresholds=(9, 9, 4), name="both")
    stream = ([(0.0, 0.0, 0.0)] * 2 + [(0.0, 0.0, 4.0)] * 2, 2)
    assert first_stop(own, stream) == 2 < first_stop(both, stream)
    assert any("thin out the mean of probe p2" in reason for reason in loosenings(own, both))
    of_maxima = dataclasses.replace(own.policy, judged=frozenset({"p0"}))
    assert not loosenings(dataclasses.replace(own, policy=of_maxima), both)
