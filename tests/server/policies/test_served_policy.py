"""Policies of a file against the breaker that is live."""

from __future__ import annotations

from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.policy_file import PolicySpec
from circuit_breakers.policies.served_policy import DEFAULT_REFUSAL, ServedPolicy, served_policy

from .manifests import MAX, MEAN, manifest

MANIFEST = manifest((4.0, 6.0), (MAX, MEAN))
OWN = ServedPolicy(policy=Policy.from_manifest(MANIFEST, "observe", 0.05))


def served(**spec: Any) -> ServedPolicy:
    return served_policy("named", PolicySpec.model_validate(spec), MANIFEST, OWN)


def thresholds(of: ServedPolicy) -> list[float]:
    return of.policy.threshold_K.tolist()


def test_what_a_policy_leaves_out_is_the_servers() -> None:
    plain = served()
    assert (plain.name, plain.policy.mode, plain.action) == ("named", "observe", "stop")
    # The promise of 5 %, of which the curve says a threshold lower by 1.
    assert thresholds(plain) == [3.0, 5.0]
    assert plain.keeps_promise and plain.refusal == DEFAULT_REFUSAL


def test_thresholds_are_those_of_the_promise_or_ones_own() -> None:
    assert thresholds(served(target_fpr=0.01)) == [4.0, 6.0]
    assert thresholds(served(threshold=1)) == [1.0, 1.0]
    some = served(threshold={"p1": 1.5})
    assert thresholds(some) == [3.0, 1.5]
    assert not some.keeps_promise


def test_means_of_the_completion_alone_keep_no_promise() -> None:
    late = served(phases=["completion"])
    assert thresholds(late) == [3.0, 5.0]
    assert not late.keeps_promise
    assert served(phases=["prompt"]).keeps_promise
    assert served(phases=["completion"], probes=["p0"], target_fpr=0.01).keeps_promise
    with pytest.raises(ConfigError, match=r"\[policies\.named\] target_fpr: .*judge both phases"):
        served(phases=["completion"], target_fpr=0.01)


def test_probes_that_are_left_out_are_not_judged() -> None:
    some = served(probes=["p1"], mode="enforce", phases=["prompt"], action="refuse", refusal="No.")
    assert some.policy.judges_K == (False, True)
    assert (some.policy.mode, some.policy.phases) == ("enforce", {"prompt"})
    assert (some.action, some.refusal) == ("refuse", "No.")


@pytest.mark.parametrize("spec", [{"probes": ["p0", "p9"]}, {"threshold": {"p9": 1.0}}])
def test_a_probe_that_the_breaker_does_not_have_is_named(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[policies\.named\].*'p9', expected one of.*p0, p1"):
        served(**spec)


def test_a_promise_that_the_data_does_not_support_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[policies\.named\] target_fpr: got target_fpr 0\.001"):
        served(target_fpr=0.001)
