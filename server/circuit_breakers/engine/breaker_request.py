"""What an operator asks of the guard: one variable, or one key of vLLM's additional_config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from circuit_breakers.engine.config import CONFIG_KEY, AdapterKind
from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.decision import Mode

__all__ = ["BreakerRequest", "is_full_form", "is_requested", "requested_breaker"]

_ENV_PREFIX = "CIRCUIT_BREAKERS_"
_FULL_FORM = {"breaker_path", "breaker_digest"}
"""Keys that only EngineGuardConfig writes."""


class BreakerRequest(BaseModel):
    """The short form: what an operator says of the breaker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    breaker: Path
    """Directory of the breaker artifact."""
    mode: Mode = "enforce"
    adapter: AdapterKind = "merged"
    target_fpr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of benign conversations that may trip, at most; None takes the breaker's own."""


def is_requested(additional_config: Any, environ: Mapping[str, str]) -> bool:
    """Whether an engine with these arguments has a breaker, in the short form or the full one.

    Raises:
        ConfigError: as requested_breaker.
    """
    return is_full_form(additional_config) or bool(requested_breaker(additional_config, environ))


def requested_breaker(additional_config: Any, environ: Mapping[str, str]) -> BreakerRequest | None:
    """What key and variables together ask for; None when neither names a breaker.

    Raises:
        ConfigError: they disagree, or a value is unknown.
    """
    entry = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    variables = {
        name: value
        for name in BreakerRequest.model_fields
        if (value := environ.get(_ENV_PREFIX + name.upper()))
    }
    if entry is None and "breaker" not in variables:
        return None
    if entry is not None and not isinstance(entry, dict):
        raise ConfigError(
            f"additional_config[{CONFIG_KEY!r}]: got a {type(entry).__name__}, expected an object "
            '{"breaker": "/path/to/breaker"}'
        )
    keys = entry or {}
    for name in sorted(variables.keys() & keys.keys()):
        if _comparable(name, variables[name]) != _comparable(name, keys[name]):
            raise ConfigError(
                f"{_ENV_PREFIX}{name.upper()} says {variables[name]!r}, "
                f"additional_config[{CONFIG_KEY!r}] says {keys[name]!r}; expected one answer, "
                "leave one of them out"
            )
    try:
        return BreakerRequest.model_validate(variables | keys)
    except ValidationError as e:
        problems = "; ".join(
            f"{'.'.join(map(str, error['loc']))}: {error['msg'].lower()}" for error in e.errors()
        )
        raise ConfigError(
            f"the breaker's settings do not fit: {problems}; expected breaker (a directory), and "
            "optionally mode (observe, enforce), adapter (merged, dynamic) and target_fpr (a "
            "share between 0 and 1)"
        ) from e


def is_full_form(additional_config: Any) -> bool:
    """Whether the guard's entry is the one that EngineGuardConfig writes."""
    entry = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    return isinstance(entry, dict) and not _FULL_FORM.isdisjoint(entry)


def _comparable(name: str, value: Any) -> Any:
    if name == "breaker" and isinstance(value, str):
        return Path(value).expanduser().resolve()
    if name == "target_fpr":
        with suppress(TypeError, ValueError):
            return float(value)
    return value
