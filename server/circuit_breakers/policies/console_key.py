"""The admin key that one server process makes for its console, and forgets with its end."""

from __future__ import annotations

import secrets

from circuit_breakers.policies.api_keys import Pepper, new_key
from circuit_breakers.policies.policy_file import CONSOLE, KeySpec

__all__ = ["ConsoleKey"]


class ConsoleKey:
    """One key beside those of the policy file, under a pepper of its own; no reload changes it."""

    def __init__(self) -> None:
        key = new_key()
        self._pepper = Pepper(secrets.token_bytes(32))
        self._spec = KeySpec(
            id=CONSOLE, hash=self._pepper.hash(key), scope=frozenset({"inference", "admin"})
        )
        self._untold: str | None = key

    def tell(self) -> str:
        """The key itself, once: only its hash stays."""
        key, self._untold = self._untold, None
        assert key is not None, "it is told once"
        return key

    def find(self, shown: str) -> KeySpec | None:
        """The key, where `shown` is it."""
        return self._pepper.find(shown, (self._spec,))
