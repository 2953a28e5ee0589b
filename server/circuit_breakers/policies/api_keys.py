"""API keys at rest and in hand.

A file holds HMAC-SHA256 of each key under a pepper that is kept elsewhere:

    hmac-sha256:<which pepper>:<digest>

A key is 256 random bits, so a slow hash would add nothing; the pepper makes a stolen file useless
for telling which key it holds. `which pepper` is itself an HMAC under it: a server with another
pepper says so, instead of refusing every key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from pydantic import Field

from circuit_breakers.errors import ConfigError

__all__ = ["PEPPER_VARIABLE", "KeyHash", "Pepper", "load_pepper", "new_key", "without_keys"]

PEPPER_VARIABLE = "CIRCUIT_BREAKERS_PEPPER"
_KEY_PREFIX = "cb-"
_IN_TEXT = re.compile(_KEY_PREFIX + r"[\w-]{40,}", re.ASCII)
_MIN_PEPPER_BYTES = 16
_CURE = (
    f"set {PEPPER_VARIABLE}, or --pepper-file FILE, to a secret of at least {_MIN_PEPPER_BYTES} "
    "characters, e.g. the output of `openssl rand -hex 32`"
)

KeyHash = Annotated[str, Field(pattern=r"^hmac-sha256:[0-9a-f]{8}:[0-9a-f]{64}$")]


class _Hashed(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def hash(self) -> str: ...


Key = TypeVar("Key", bound=_Hashed)


class Pepper:
    """The secret half of every hash."""

    def __init__(self, secret: bytes) -> None:
        """Takes a secret in.

        Raises:
            ConfigError: it is too short to be one.
        """
        if len(secret) < _MIN_PEPPER_BYTES:
            raise ConfigError(f"got a pepper of {len(secret)} characters; {_CURE}")
        self._secret = secret
        self.name = self._digest("circuit-breakers pepper")[:8]
        """Tells peppers apart and says nothing else of one."""

    def hash(self, key: str) -> str:
        """What a policy file holds of `key`."""
        return f"hmac-sha256:{self.name}:{self._digest(key)}"

    def find(self, shown: str, keys: Sequence[Key]) -> Key | None:
        """The one of `keys` that `shown` is; None when it is none of them.

        Takes the same time whichever it is, and however close another one came.
        """
        shown_hash = self.hash(shown)
        found = None
        for key in keys:
            # No early exit: every one is compared.
            if hmac.compare_digest(shown_hash, key.hash):
                found = key
        return found

    def check_made(self, keys: Sequence[_Hashed]) -> None:
        """Passes when every hash was made with this pepper.

        Raises:
            ConfigError: naming the ids whose keys could never be found.
        """
        start = f"hmac-sha256:{self.name}:"
        if foreign := sorted({key.id for key in keys if not key.hash.startswith(start)}):
            raise ConfigError(
                f"keys of {', '.join(foreign)} were hashed with another pepper than the server's "
                f"({self.name}); give the server that pepper, or make new keys with this one"
            )

    def _digest(self, text: str) -> str:
        # Whatever a header may hold has a hash.
        raw = text.encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, raw, hashlib.sha256).hexdigest()


def new_key() -> str:
    """A random key."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def without_keys(text: str) -> str:
    """A text for people, with every key in it taken out."""
    return _IN_TEXT.sub("<an API key>", text)


def load_pepper(environ: Mapping[str, str], file: Path | None) -> Pepper:
    """The pepper from its variable or its file.

    Raises:
        ConfigError: there is none, there are two, or it is too short.
    """
    variable = environ.get(PEPPER_VARIABLE, "")
    if variable and file is not None:
        raise ConfigError(
            f"got both {PEPPER_VARIABLE} and --pepper-file, expected one pepper; leave one out"
        )
    if file is None:
        if not variable:
            raise ConfigError(f"got API keys and no pepper to check them with; {_CURE}")
        return Pepper(variable.strip().encode())
    try:
        return Pepper(file.read_bytes().strip())
    except OSError as e:
        raise ConfigError(f"cannot read the pepper file {file}: {e.strerror}; {_CURE}") from e
