"""How the breaker travels to every process of the engine: inside vLLM's `additional_config`.

vLLM hashes `additional_config` into its compile-cache key, so a graph compiled without the probe is
never reused with it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.errors import BreakerMismatchError, ConfigError
from circuit_breakers.guard.decision import Mode

__all__ = [
    "ADAPTER_NAME",
    "CONFIG_KEY",
    "MERGE_MARKER",
    "AdapterKind",
    "EngineGuardConfig",
    "check_merged_checkpoint",
]

CONFIG_KEY = "circuit_breakers"
ADAPTER_NAME = "circuit-breaker"
"""Name of the dynamic LoRA; requests under any other adapter count as unscored."""

MERGE_MARKER = "circuit_breakers_merge.json"
"""File of a merged checkpoint that names the adapter inside: {"adapter_sha256": ...}."""

AdapterKind = Literal["merged", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class EngineGuardConfig:
    """What worker and scheduler need to know, as plain JSON values."""

    breaker_path: str
    breaker_digest: str
    """sha256 of the manifest; a breaker replaced on disk after launch is refused."""
    mode: Mode
    adapter: AdapterKind
    target_fpr: float | None = None
    """The promise whose thresholds are in force; None takes the breaker's own."""

    def to_additional_config(self) -> dict[str, Any]:
        return {CONFIG_KEY: asdict(self)}

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> EngineGuardConfig | None:
        """The guard's part of a VllmConfig; None when no breaker is configured.

        Raises:
            ConfigError: the entry is there but malformed.
        """
        additional = vllm_config.additional_config
        raw = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        if raw is None:
            return None
        try:
            config = cls(**raw)
        except TypeError as e:
            raise ConfigError(
                f"additional_config[{CONFIG_KEY!r}] does not fit: {e}; "
                "start the engine through circuit_breakers.engine.launch"
            ) from e
        if config.mode not in ("observe", "enforce") or config.adapter not in ("merged", "dynamic"):
            raise ConfigError(
                f"additional_config[{CONFIG_KEY!r}]: got mode {config.mode!r}, adapter "
                f"{config.adapter!r}; expected observe|enforce, merged|dynamic"
            )
        target_fpr = config.target_fpr
        if target_fpr is not None and not (isinstance(target_fpr, float) and 0 < target_fpr < 1):
            raise ConfigError(
                f"additional_config[{CONFIG_KEY!r}]: got target_fpr {target_fpr!r}, expected a "
                "share between 0 and 1, or none"
            )
        return config

    def load_breaker(self) -> Breaker:
        """The breaker, verified against the digest that the launch was given."""
        breaker = load_breaker(Path(self.breaker_path))
        if breaker.digest != self.breaker_digest:
            raise BreakerMismatchError(
                f"breaker at {self.breaker_path} has digest {breaker.digest}, expected "
                f"{self.breaker_digest}; it changed after launch, restart the server"
            )
        return breaker


def check_merged_checkpoint(checkpoint: Path, breaker: Breaker) -> None:
    """Refuses a checkpoint whose weights do not hold the breaker's adapter.

    Raises:
        BreakerMismatchError: it is not a merged checkpoint, or holds another adapter.
    """
    expected = breaker.manifest.files["adapter/adapter_model.safetensors"]
    marker = checkpoint / MERGE_MARKER
    got = json.loads(marker.read_bytes()).get("adapter_sha256") if marker.is_file() else None
    if got != expected:
        raise BreakerMismatchError(
            f"the engine loaded {checkpoint}, which holds "
            f"{'no merged adapter' if got is None else f'adapter {got[:12]}'}; expected adapter "
            f"{expected[:12]} of breaker {breaker.manifest.name!r}; start through "
            "circuit_breakers.engine.launch, which merges it"
        )
