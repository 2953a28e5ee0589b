"""A named policy against the breaker that is live: how streams are judged, what a trip does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.errors import CalibrationError, ConfigError
from circuit_breakers.guard.operating_point import probes_at
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.policy_file import PolicySpec, TripAction

__all__ = ["DEFAULT_REFUSAL", "ServedPolicy", "at_target_fpr", "at_threshold", "served_policy"]

DEFAULT_REFUSAL = "I can't help with that."


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """What one request runs under."""

    policy: Policy
    action: TripAction = "stop"
    refusal: str = DEFAULT_REFUSAL
    """Stands in the place of a tripped text under action `refuse`."""
    keeps_promise: bool = True
    """The thresholds are those of a calibrated promise, not somebody's own."""

    @property
    def name(self) -> str:
        return self.policy.name


def served_policy(
    name: str, spec: PolicySpec, manifest: Manifest, default: ServedPolicy
) -> ServedPolicy:
    """A policy of the file, with what it leaves out taken from the server's own.

    Raises:
        ConfigError: the breaker has no such probe, or its data does not support the promise.
    """
    known = [probe.name for probe in manifest.probes]
    named = set(spec.probes or ()) | set(_table(spec.threshold))
    if unknown := sorted(named - set(known)):
        raise ConfigError(
            f"[policies.{name}]: got probe {unknown[0]!r}, expected one of breaker "
            f"{manifest.name!r}: {', '.join(known)}; correct its name"
        )
    policy = dataclasses.replace(
        default.policy,
        name=name,
        mode=spec.mode or default.policy.mode,
        judged=spec.probes,
        phases=spec.phases,
    )
    served = ServedPolicy(
        policy=policy,
        action=spec.action,
        refusal=spec.refusal or DEFAULT_REFUSAL,
        keeps_promise=default.keeps_promise,
    )
    if spec.threshold is not None:
        return at_threshold(served, spec.threshold)
    if spec.target_fpr is None:
        return served
    try:
        return at_target_fpr(served, spec.target_fpr, manifest)
    except CalibrationError as e:
        raise ConfigError(f"[policies.{name}] target_fpr: {e}") from e


def at_target_fpr(served: ServedPolicy, target_fpr: float, manifest: Manifest) -> ServedPolicy:
    """The same policy with the thresholds of a promise.

    Raises:
        CalibrationError: the breaker's data does not support it.
    """
    probes = probes_at(manifest, target_fpr)
    policy = dataclasses.replace(served.policy, probes=probes)
    return dataclasses.replace(served, policy=policy, keeps_promise=True)


def at_threshold(served: ServedPolicy, threshold: float | Mapping[str, float]) -> ServedPolicy:
    """The same policy with thresholds of somebody's own: one for all probes, or some by name."""
    table = _table(threshold)
    probes = tuple(
        probe.model_copy(
            update={
                "threshold_logit": table.get(probe.name, probe.threshold_logit)
                if isinstance(threshold, Mapping)
                else float(threshold)
            }
        )
        for probe in served.policy.probes
    )
    policy = dataclasses.replace(served.policy, probes=probes)
    return dataclasses.replace(served, policy=policy, keeps_promise=False)


def _table(threshold: float | Mapping[str, float] | None) -> Mapping[str, float]:
    return threshold if isinstance(threshold, Mapping) else {}
