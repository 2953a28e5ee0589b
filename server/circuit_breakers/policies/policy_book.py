"""All policies of a file against the live breaker, and who runs under which."""

from __future__ import annotations

from dataclasses import dataclass

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.errors import ConfigError
from circuit_breakers.policies.policy_file import KeySpec, LoadedFile
from circuit_breakers.policies.served_policy import ServedPolicy, served_policy
from circuit_breakers.policies.tightening import GuardRequest, tighten

__all__ = ["PolicyBook"]


@dataclass(frozen=True, kw_only=True)
class PolicyBook:
    """Never changed; a reload makes another one, and whoever holds this one keeps it."""

    manifest: Manifest
    """Of the live breaker."""
    policies: dict[str, ServedPolicy]
    """By name."""
    default: ServedPolicy
    """Of callers without a key, and of keys without a policy."""

    @classmethod
    def without_file(cls, own: ServedPolicy, manifest: Manifest) -> PolicyBook:
        """The server's own policy and no other."""
        return cls(manifest=manifest, policies={own.name: own}, default=own)

    @classmethod
    def from_file(cls, file: LoadedFile, own: ServedPolicy, manifest: Manifest) -> PolicyBook:
        """The policies of a file.

        Args:
            own: the server's; what a policy leaves out is taken from it.
        Raises:
            ConfigError: one of them does not fit the breaker.
        """
        try:
            policies = {
                name: served_policy(name, spec, manifest, own)
                for name, spec in file.content.policies.items()
            }
        except ConfigError as e:
            raise ConfigError(f"{file.path}: {e}") from e
        default = policies[file.content.default]
        return cls(manifest=manifest, policies=policies, default=default)

    def of_key(self, key: KeySpec | None) -> ServedPolicy:
        """What a caller with this key runs under; None for one without."""
        if key is None or key.policy is None:
            return self.default
        return self.policies[key.policy]

    def tightened(self, own: ServedPolicy, asked: GuardRequest) -> ServedPolicy:
        """What a request asks for, at least as strict as the caller's own.

        Raises:
            PolicyRequestError: it would loosen something, or is not there.
        """
        return tighten(own, asked, self.policies, self.manifest)
