"""What a comparison is asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.evaluation.settings import check_new
from circuit_breakers_training.peers.text_guards import TEXT_GUARDS

__all__ = ["GUARDS", "GuardsSettings"]

GUARDS: Final = (*TEXT_GUARDS, "judge", "adapter", "probe", "both")
"""Names that --skip takes."""


@dataclass(frozen=True, kw_only=True)
class GuardsSettings:
    """One comparison."""

    artifact: Path
    """Directory of the breaker."""
    data: Path
    """Built dataset."""
    out: Path
    """Directory of the results, made new."""
    model: str | None = None
    """Base model; that of the manifest unless given."""
    limit: int | None = None
    """Test conversations of each label at most, and benign calibration ones, but never fewer than
    the promise needs."""
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks what can be checked without the artifact.

        Raises:
            ConfigError: a setting cannot take effect.
        """
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"got limit {self.limit}, expected at least 1")
        check_new(self.out)
