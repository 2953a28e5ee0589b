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
    has_calibrated_thresholds: bool = True
    """They are those of a promise, not somebody's own."""

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def keeps_promise(self) -> bool:
        """Whether the calibrated rate holds for these thresholds and running scores."""
        return self.has_calibrated_thresholds and not self.policy.may_outscore_calibration


def served_policy(
    name: str, spec: PolicySpec, manifest: Manifest, default: ServedPolicy
) -> ServedPolicy:
    """A policy of the file, with what it leaves out taken from the server's own.

    Raises:
        ConfigError: the breaker has no such probe, or its data or the policy's phases do not
            support the promise.
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
        has_calibrated_thresholds=default.has_calibrated_thresholds,
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
        CalibrationError: the breaker's data does not support it, or nobody knows how often the
            policy trips.
    """
    if served.policy.may_outscore_calibration:
        raise CalibrationError(
            f"got target_fpr {target_fpr:g} for policy {served.name!r}, whose means start with the "
            "completion, expected one that judges the prompt too, as the calibration did; judge "
            "both phases, or leave target_fpr out"
        )
    probes = probes_at(manifest, target_fpr)
    policy = dataclasses.replace(served.policy, probes=probes)
    return dataclasses.replace(served, policy=policy, has_calibrated_thresholds=True)


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
    return dataclasses.replace(served, policy=policy, has_calibrated_thresholds=False)


def _table(threshold: float | Mapping[str, float] | None) -> Mapping[str, float]:
    return threshold if isinstance(threshold, Mapping) else {}
