"""How much load one API key may put on the server."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["KeyLimits"]

Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]


class KeyLimits(BaseModel):
    """Limits of one key id, over all of its keys; None leaves one to the server's setting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_concurrent: Count | None = None
    """Requests that run at once."""
    requests_per_minute: Count | None = None
    """Rate at which the bucket of tokens fills, one token a request."""
    burst: Count | None = None
    """Size of that bucket: requests that may come at once after a pause."""

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> KeyLimits:
        if self.burst is not None and self.requests_per_minute is None:
            raise ValueError(
                f"got burst {self.burst} without requests_per_minute, expected both; add the rate"
            )
        return self
