"""The policy file: named policies and API keys, in TOML.

    default = "standard"              # who brings no key, or a key without a policy

    [policies.standard]
    target_fpr = 0.01

    [policies.strict]
    threshold = { layer16 = 2.5 }
    action = "refuse"

    [[keys]]
    id = "team-a"
    hash = "hmac-sha256:..."          # circuit-breakers keys new --id team-a
    policy = "strict"

A file is taken whole or not at all. Errors name file, table and field, and never show a value that
could be a secret.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.decision import Mode, Phase
from circuit_breakers.policies.api_keys import KeyHash, without_keys
from circuit_breakers.policies.limits import KeyLimits

__all__ = [
    "ANONYMOUS",
    "CONSOLE",
    "RESERVED_IDS",
    "KeySpec",
    "LoadedFile",
    "PolicyFile",
    "PolicySpec",
    "Share",
    "Threshold",
    "TripAction",
    "load_policy_file",
]

ANONYMOUS = "anonymous"
"""Key id of a caller without a key."""
CONSOLE = "console"
"""Key id of the key that a process makes for its console."""

TripAction = Literal["stop", "refuse", "error"]
"""What a client sees of a trip: its text up to there, a refusal in the place of the text, or an
error 400. A tripped prompt is an error 400 under `stop` too."""

Scope = Literal["inference", "admin"]
_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_IS_NAME = re.compile(_NAME).match
Name = Annotated[str, Field(pattern=_NAME)]
Threshold = Annotated[float, Field(strict=True, ge=-1e6, le=1e6, allow_inf_nan=False)]
"""A logit. Far beyond what a probe gives, and well within float32."""
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]

RESERVED_IDS = {
    ANONYMOUS: "callers without a key",
    CONSOLE: "the key of serve --console",
    "server": "what the server does by itself",
}
"""Ids that the audit log has a meaning of its own for."""
_MAX_SHOWN = 5
_NAME_TEXT = "lower-case letters, digits, '.', '_' and '-', at most 64"
_EXPECTED = {
    "timezone_aware": "a time with its zone, such as 2027-01-01T00:00:00Z",
    "too_short": "at least one",
}
"""What is expected, where pydantic's words for it would not fit the sentence."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicySpec(_Frozen):
    """One named policy; what it leaves out is as the server's settings say."""

    mode: Mode | None = None
    target_fpr: Share | None = None
    """Promise whose thresholds are taken, of those that the breaker's data supports."""
    threshold: Threshold | dict[Name, Threshold] | None = None
    """Instead of a promise: one threshold for all probes, or one each by name."""
    phases: Annotated[frozenset[Phase], Field(min_length=1)] = frozenset({"prompt", "completion"})
    probes: Annotated[frozenset[Name], Field(min_length=1)] | None = None
    """Those that are judged; None takes all of the breaker's."""
    action: TripAction = "stop"
    refusal: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Text of action `refuse`."""


class KeySpec(_Frozen):
    """One API key. Keys of one id differ in nothing but hash and expiry: they rotate."""

    id: Name
    hash: KeyHash
    policy: Name | None = None
    """None takes the file's default."""
    models: Annotated[frozenset[str], Field(min_length=1)] | None = None
    """Names that the key may pass as `model`; None takes all that are served."""
    scope: Annotated[frozenset[Scope], Field(min_length=1)] = frozenset({"inference"})
    expires: AwareDatetime | None = None
    limits: KeyLimits | None = None

    def has_expired(self, now: datetime | None = None) -> bool:
        """Whether the key is past its time."""
        return self.expires is not None and (now or datetime.now(UTC)) >= self.expires


class PolicyFile(_Frozen):
    """The content of one file, consistent in itself."""

    default: Name
    """Policy of callers without a key, and of keys without a policy."""
    metrics: Literal["open", "key"] = "open"
    """Whether /metrics wants a key once there are keys."""
    policies: Annotated[dict[Name, PolicySpec], Field(min_length=1)]
    keys: tuple[KeySpec, ...] = ()


class LoadedFile(NamedTuple):
    """A policy file as it was read."""

    path: Path
    content: PolicyFile
    digest: str
    """sha256 of its bytes."""


def load_policy_file(path: Path) -> LoadedFile:
    """The file at `path`, checked.

    Raises:
        ConfigError: it cannot be read, or something in it does not fit; naming table and field.
    """
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read the policy file {path}: {e.strerror}; pass --policies FILE"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from e
    except (ValueError, RecursionError) as e:  # tomllib's own, and those that it lets through
        raise ConfigError(f"{path}: not TOML: {e}; fix the line") from e
    try:
        content = PolicyFile.model_validate(data)
    except ValidationError as e:
        problems = [_describe(problem, data) for problem in e.errors(include_url=False)]
        more = len(problems) - _MAX_SHOWN
        shown = "; ".join(problems[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        # Somebody may have put a key anywhere, for want of knowing where its hash belongs.
        raise ConfigError(f"{path}: {without_keys(shown)}") from e
    if problem := _inconsistency(content):
        raise ConfigError(f"{path}: {without_keys(problem)}")
    return LoadedFile(path, content, hashlib.sha256(raw).hexdigest())


def _inconsistency(file: PolicyFile) -> str | None:
    """What does not fit together; None when all does."""
    names = ", ".join(sorted(file.policies))
    if file.default not in file.policies:
        return f"default: got {file.default!r}, expected one of the policies {names}; add a table"
    for name, spec in file.policies.items():
        if spec.target_fpr is not None and spec.threshold is not None:
            return (
                f"[policies.{name}]: got target_fpr and threshold, expected one; remove the other"
            )
        if spec.refusal is not None and spec.action != "refuse":
            return (
                f"[policies.{name}] refusal: got a text with action {spec.action!r}, expected "
                "action 'refuse'; change the action or remove the text"
            )
        table = spec.threshold if isinstance(spec.threshold, dict) else {}
        if spec.probes and (apart := table.keys() - spec.probes):
            return (
                f"[policies.{name}] threshold: got probe {min(apart)!r}, expected one that "
                "`probes` lists; add it there, or remove it here"
            )
    return _inconsistent_keys(file.keys, file.policies.keys())


def _inconsistent_keys(keys: Sequence[KeySpec], policies: Any) -> str | None:
    by_id: dict[str, KeySpec] = {}
    hashes: dict[str, str] = {}
    for number, key in enumerate(keys, start=1):
        table = f"[[keys]] number {number} (id {key.id!r})"
        if stands_for := RESERVED_IDS.get(key.id):
            return f"{table} id: got {key.id!r}, which stands for {stands_for}; rename it"
        if key.policy is not None and key.policy not in policies:
            return (
                f"{table} policy: got {key.policy!r}, expected one of the policies "
                f"{', '.join(sorted(policies))}; add a table"
            )
        if key.hash in hashes:
            return f"{table} hash: got that of id {hashes[key.hash]!r} again; make a new key"
        hashes[key.hash] = key.id
        first = by_id.setdefault(key.id, key)
        apart = [
            name
            for name in ("policy", "models", "scope", "limits")
            if getattr(key, name) != getattr(first, name)
        ]
        if apart:
            return (
                f"{table} {apart[0]}: differs from an earlier key of that id, expected the same in "
                "all keys of one id; change it in all of them, or use another id"
            )
    return None


def _describe(problem: Any, data: dict[str, Any]) -> str:
    location, kind = problem["loc"], problem["type"]
    table, fields = _table(location, data)
    field = ".".join(str(part) for part in fields)
    place = " ".join(part for part in (table, field) if part)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        return f"{place}: got nothing, expected a value; add it"
    if kind == "extra_forbidden":
        return f"{place}: got an unknown field; remove it, or correct its name"
    if kind == "value_error":
        return f"{place}: {message}"
    # Somebody may have put a key where its hash or its id belongs.
    secret = location[0] == "keys" and field in ("hash", "id")
    got = "another value" if secret else repr(problem["input"])
    if secret and field == "hash":
        expected, cure = "hmac-sha256:<8 hex>:<64 hex>", "take it from `circuit-breakers keys new`"
    elif kind == "string_pattern_mismatch":
        expected, cure = _NAME_TEXT, "rename it"
    else:
        plain = message.replace("Input should be ", "").replace("Input should ", "")
        expected, cure = _EXPECTED.get(kind, plain[:1].lower() + plain[1:]), "change it"
    return f"{place}: got {got}, expected {expected}; {cure}"


def _table(location: tuple[int | str, ...], data: dict[str, Any]) -> tuple[str, Sequence[Any]]:
    if len(location) > 1 and location[0] == "policies":
        return f"[policies.{location[1]}]", _without_branches(location[2:])
    if len(location) > 1 and location[0] == "keys" and isinstance(location[1], int):
        key = data["keys"][location[1]]
        name = key.get("id") if isinstance(key, dict) else None
        shown = f" (id {name!r})" if isinstance(name, str) and _IS_NAME(name) else ""
        return f"[[keys]] number {location[1] + 1}{shown}", location[2:]
    return "", location


def _without_branches(fields: Sequence[Any]) -> Sequence[Any]:
    """Without pydantic's names for the branches of a union."""
    return [field for field in fields if not str(field).startswith(("float", "dict[", "constr"))]
