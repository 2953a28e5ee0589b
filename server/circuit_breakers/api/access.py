"""Who asks, and what they may."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from circuit_breakers.api.errors import ApiError

__all__ = ["Caller", "require_admin"]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whoever sent a request."""

    key_id: str
    """Public id of their API key, or anonymous."""
    is_admin: bool = False


def require_admin(request: Request) -> Caller:
    """The operator behind a request.

    Raises:
        ApiError: 403, it is not one; without a policy file nobody is.
    """
    raise ApiError(
        403,
        f"{request.method} {request.url.path} needs an admin key; give one in the policy file",
        code="admin_key_required",
    )
