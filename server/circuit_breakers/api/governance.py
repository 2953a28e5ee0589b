"""The policy file in force, and how it is replaced while the server runs.

    file, pepper -> checked against the live breaker -> in force

A file that does not fit changes nothing. Whoever runs keeps what it started with.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.api_keys import Pepper, load_pepper
from circuit_breakers.policies.console_key import ConsoleKey
from circuit_breakers.policies.policy_book import PolicyBook
from circuit_breakers.policies.policy_file import KeySpec, LoadedFile, load_policy_file
from circuit_breakers.policies.served_policy import ServedPolicy
from circuit_breakers.settings import ServeSettings

__all__ = ["Governance", "Rules"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is in force, as one value: it is replaced whole."""

    file: LoadedFile | None = None
    pepper: Pepper | None = None
    """Set where the file has keys."""
    book: PolicyBook | None = None
    """None until the breaker is known."""
    console: ConsoleKey | None = None
    """Set where this process has made one. Nobody else needs a key for that."""

    @property
    def keys(self) -> tuple[KeySpec, ...]:
        """Those of the file; with any, everybody needs one."""
        return self.file.content.keys if self.file else ()

    @property
    def metrics_are_open(self) -> bool:
        return self.file is None or self.file.content.metrics == "open"

    def key_of(self, shown: str) -> KeySpec | None:
        """The key that somebody shows; None when it is neither the file's nor the console's."""
        found = self.pepper.find(shown, self.keys) if self.pepper else None
        own = self.console.find(shown) if self.console else None
        return own or found


class Governance:
    """Holds the rules of one server process."""

    def __init__(self, settings: ServeSettings) -> None:
        """Reads the file, if there is one.

        Raises:
            ConfigError: it does not fit.
        """
        self._path = settings.policies
        self._pepper_file = settings.pepper_file
        self._console = ConsoleKey() if settings.console else None
        self._breaker: tuple[Manifest, ServedPolicy] | None = None
        self.rules = self._read()

    @property
    def has_file(self) -> bool:
        return self._path is not None

    @property
    def book(self) -> PolicyBook:
        """The policies in force, once there is a breaker."""
        assert self.rules.book is not None, "attach() comes first"
        return self.rules.book

    def check(self, manifest: Manifest, own: Policy) -> None:
        """Passes when every policy fits a breaker.

        Raises:
            ConfigError: one does not.
        """
        self._with_book(self.rules, manifest, ServedPolicy(policy=own))

    def attach(self, manifest: Manifest, own: Policy) -> None:
        """Puts the policies in force for the breaker that is live.

        Args:
            own: the engine's own policy; what a policy of the file leaves out is taken from it.
        Raises:
            ConfigError: one of them does not fit.
        """
        served = ServedPolicy(policy=own)
        self.rules = self._with_book(self.rules, manifest, served)
        self._breaker = (manifest, served)

    def reload(self) -> dict[str, Any]:
        """Takes the file as it is now; what is in force afterwards, for people.

        Raises:
            ConfigError: it does not fit; everything stays as it was.
        """
        try:
            self.rules = self._reread()
        except ConfigError as e:
            logger.error("policy file refused, the old one stays in force: %s", e)
            raise
        assert self.rules.file is not None, "without a file there is an error"
        logger.warning("policy file in force: sha256=%s", self.rules.file.digest)
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """What is in force; nothing secret."""
        file, keys = self.rules.file, self.rules.keys
        return {
            "object": "breaker.policies",
            "digest": file.digest if file else None,
            "default": file.content.default if file else None,
            "policies": sorted(file.content.policies) if file else [],
            "key_ids": sorted({key.id for key in keys}),
        }

    def _reread(self) -> Rules:
        if self._path is None:
            raise ConfigError("got no policy file to read again; start with --policies FILE")
        rules = self._read()
        if self.rules.keys and not rules.keys:
            # Half a file would open the server to everybody.
            raise ConfigError(
                f"{self._path}: got no keys, expected some, as the file in force has them; to "
                "serve without keys, restart the server"
            )
        return rules if self._breaker is None else self._with_book(rules, *self._breaker)

    def _read(self) -> Rules:
        if self._path is None:
            return Rules(console=self._console)
        file = load_policy_file(self._path)
        if not file.content.keys:
            return Rules(file=file, console=self._console)
        pepper = load_pepper(os.environ, self._pepper_file)
        pepper.check_made(file.content.keys)
        return Rules(file=file, pepper=pepper, console=self._console)

    @staticmethod
    def _with_book(rules: Rules, manifest: Manifest, own: ServedPolicy) -> Rules:
        if rules.file is None:
            book = PolicyBook.without_file(own, manifest)
        else:
            book = PolicyBook.from_file(rules.file, own, manifest)
        return replace(rules, book=book)
