"""The operating point that a server runs at: the probes, with the thresholds of one promise."""

from __future__ import annotations

import math

from circuit_breakers.artifact.manifest import Manifest, OperatingPoint, ProbeSpec
from circuit_breakers.errors import CalibrationError

__all__ = ["probes_at"]

_MAX_NEEDED = 1e12
"""Conversations above which a number says nothing more; it may be infinite."""


def probes_at(manifest: Manifest, target_fpr: float | None) -> tuple[ProbeSpec, ...]:
    """The breaker's probes with the lowest thresholds whose proven bound is within `target_fpr`.

    Lower thresholds catch more, so this is the stored point of exactly that promise, or else the
    nearest stricter one. Threshold and calibration of each probe become those of the point.

    Args:
        target_fpr: share of benign conversations that may trip, at most; None takes the promise
            that the breaker was exported with.
    Raises:
        CalibrationError: the breaker's data supports no such promise.
    """
    if target_fpr is None:
        return manifest.probes
    curves = [_points(probe, num_probes=len(manifest.probes)) for probe in manifest.probes]
    if not all(curves):
        raise CalibrationError(
            f"got target_fpr {target_fpr:g} for breaker {manifest.name!r}, whose "
            f"{len(manifest.probes)} probes were calibrated one by one, expected probes calibrated "
            "together, which alone say how often any of them trips; leave target_fpr out, or train "
            "the breaker again"
        )
    # Loosest first: the first that keeps the promise catches the most.
    for number, point in enumerate(curves[0]):
        if point.fpr_upper_bound <= target_fpr:
            return tuple(
                _at(probe, curve[number])
                for probe, curve in zip(manifest.probes, curves, strict=True)
            )
    raise CalibrationError(_unsupported(manifest, curves[0], target_fpr))


def _points(probe: ProbeSpec, *, num_probes: int) -> tuple[OperatingPoint, ...]:
    calibration = probe.calibration
    if calibration.curve or num_probes > 1:
        return calibration.curve
    # A breaker from before there were curves: its one promise, taken as it stands.
    shared = calibration.model_dump(include=set(OperatingPoint.model_fields))
    return (OperatingPoint.model_construct(threshold_logit=probe.threshold_logit, **shared),)


def _at(probe: ProbeSpec, point: OperatingPoint) -> ProbeSpec:
    promise = point.model_dump(exclude={"threshold_logit"})
    calibration = probe.calibration.model_copy(update=promise)
    update = {"threshold_logit": point.threshold_logit, "calibration": calibration}
    return probe.model_copy(update=update)


def _unsupported(manifest: Manifest, curve: tuple[OperatingPoint, ...], target_fpr: float) -> str:
    calibration = manifest.probes[0].calibration
    stored = ", ".join(f"{point.target_fpr:g}" for point in curve)
    # Without a trip in n, the Clopper-Pearson bound is 1 - (1 - confidence) ** (1 / n).
    exact = math.log1p(-calibration.confidence) / math.log1p(-target_fpr)
    needed = math.ceil(min(exact, _MAX_NEEDED))
    return (
        f"got target_fpr {target_fpr:g} for breaker {manifest.name!r}, whose "
        f"{calibration.num_conversations} benign conversations show at best "
        f"{curve[-1].fpr_upper_bound:.3g}; expected one of {stored} or more; pass one of these, or "
        f"train with at least {needed} benign conversations in the calibration split"
    )
