"""The hash chain: what makes a change, a gap or another order in the log show.

    digest(row) = SHA-256 of the row's canonical JSON, which holds its number and the digest before
    mac(row)    = HMAC-SHA-256 of the digest under the operator's key, if there is one

Pure: rows are plain dicts, as they come from a database or from an export.

Without a key, whoever can rewrite the whole table can make a new chain that fits; with one, they
would need the key. Neither shows that the newest rows were cut off: for that, keep the head that
`verify` prints, or the series circuit_breakers_audit_sequence, elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from circuit_breakers.audit.entry import AuditEntry
from circuit_breakers.errors import ConfigError

__all__ = [
    "GENESIS",
    "HASHED_FIELDS",
    "HEAD_LOST",
    "Head",
    "Signer",
    "checkpoint_detail",
    "digest",
    "linked",
]

GENESIS = "0" * 64
"""Digest before the first row."""
HEAD_LOST = "head_lost"
"""Action of the checkpoint that a writer adds when rows that it wrote are no longer there."""

_VERSION = 1
_ENTRY_FIELDS = tuple(field.name for field in fields(AuditEntry))
HASHED_FIELDS = ("seq", "version", "prev_hash", *_ENTRY_FIELDS)
_MIN_KEY_BYTES = 32


class Head(NamedTuple):
    """The newest row: enough to notice later that it was cut off."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Reads what `str` gives.

        Raises:
            ConfigError: it is no head.
        """
        found = re.fullmatch("([0-9]{1,19}):([0-9a-f]{64})", text.strip())
        if found is None:
            raise ConfigError(f"got head {text!r}, expected SEQ:HASH as `audit verify` prints it")
        return cls(int(found[1]), found[2])


def digest(row: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a row but its own digest and MAC, as 64 hex digits."""
    body = {name: row[name] for name in HASHED_FIELDS}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class Signer:
    """Signs rows with the newest of the operator's keys, and checks those of any of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {_fingerprint(key): key for key in keys}
        self._newest = _fingerprint(keys[0])

    @classmethod
    def from_files(cls, paths: Sequence[Path]) -> Signer | None:
        """The keys in these files, the one to sign with first; None without a file.

        Raises:
            ConfigError: a file cannot be read, or its key is too short to be one.
        """
        return cls([_read_key(path) for path in paths]) if paths else None

    def mac(self, row_hash: str) -> str:
        """Key's fingerprint and HMAC of a row's digest."""
        return f"{self._newest}:{_hmac(self._keys[self._newest], row_hash)}"

    def accepts(self, row_hash: str, mac: str) -> bool:
        fingerprint, _, value = str(mac).partition(":")
        key = self._keys.get(fingerprint)
        return key is not None and hmac.compare_digest(
            _hmac(key, row_hash).encode(), value.encode("utf-8", "replace")
        )


def linked(
    entries: Iterable[AuditEntry], head: Head | None, signer: Signer | None
) -> list[dict[str, Any]]:
    """Rows that continue the chain after `head`; None starts one."""
    rows = []
    seq, prev_hash = head or Head(0, GENESIS)
    for entry in entries:
        seq += 1
        row = {"seq": seq, "version": _VERSION, "prev_hash": prev_hash} | entry.to_json()
        row["hash"] = prev_hash = digest(row)
        row["mac"] = signer.mac(prev_hash) if signer else None
        rows.append(row)
    return rows


def checkpoint_detail(last_removed: Head) -> str:
    """What the checkpoint of a pruning says: the row up to which all were taken out."""
    return f"pruned {last_removed}"


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as e:
        raise ConfigError(f"audit key file {path}: {e.strerror}; give one that can be read") from e
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(
            f"audit key file {path} holds {len(key)} bytes, expected {_MIN_KEY_BYTES} or more; "
            "make one with `openssl rand -hex 32`"
        )
    return key


def _hmac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("ascii", "replace"), hashlib.sha256).hexdigest()


def _fingerprint(key: bytes) -> str:
    return _hmac(key, "circuit-breakers audit key")[:8]
