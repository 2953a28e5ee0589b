"""What counts as a trip: the probes, their thresholds, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from circuit_breakers.artifact.manifest import Manifest, ProbeSpec
from circuit_breakers.guard.decision import Mode

__all__ = ["DEFAULT_POLICY_NAME", "Policy"]

DEFAULT_POLICY_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Thresholds and mode that one stream is judged by."""

    breaker: str
    """Name of the breaker whose probes are judged."""
    probes: tuple[ProbeSpec, ...]
    """In the order of the score columns."""
    mode: Mode
    name: str = DEFAULT_POLICY_NAME

    @classmethod
    def from_manifest(cls, manifest: Manifest, mode: Mode) -> Policy:
        """The policy that the breaker was calibrated for."""
        return cls(breaker=manifest.name, probes=manifest.probes, mode=mode)
