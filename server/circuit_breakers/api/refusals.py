"""What a request is told that meets a limit: the error, when to come back, and OpenAI's headers."""

from __future__ import annotations

import math

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.token_bucket import TokenBucket

__all__ = [
    "queue_full",
    "queue_timeout",
    "rate_headers",
    "request_timeout",
    "shutting_down",
    "too_fast",
]

_RETRY_AFTER_S = "5"


def rate_headers(bucket: TokenBucket, now_s: float) -> dict[str, str]:
    """Limit, rest and time until the limit is whole again, under OpenAI's names."""
    return {
        "x-ratelimit-limit-requests": str(bucket.per_minute),
        "x-ratelimit-remaining-requests": str(bucket.remaining(now_s)),
        "x-ratelimit-reset-requests": _duration(bucket.full_in_s(now_s)),
    }


def too_fast(bucket: TokenBucket, now_s: float) -> ApiError:
    """429, with the time at which there is a token."""
    wait_s = bucket.token_in_s(now_s)
    return ApiError(
        429,
        f"rate limit reached: this key may make {bucket.per_minute} requests a minute; try again "
        f"in {_duration(wait_s)}",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(math.ceil(wait_s)), **rate_headers(bucket, now_s)},
    )


def queue_full() -> ApiError:
    return _unavailable("queue_full", "the server is busy and its queue is full")


def queue_timeout(time_s: float) -> ApiError:
    """For a request whose time went by in the queue."""
    return _unavailable("queue_timeout", f"the request waited for {time_s:g} s and never ran")


def request_timeout(time_s: float) -> ApiError:
    """For a request that ran, and not to its end."""
    return ApiError(
        504,
        f"the request ran longer than {time_s:g} s and was ended; ask for less, e.g. by "
        "'max_tokens', or raise --request-timeout-s on the server",
        code="request_timeout",
    )


def shutting_down() -> ApiError:
    # Closed, so that the next request of this connection goes to another server.
    return _unavailable("shutting_down", "the server is shutting down", Connection="close")


def _unavailable(code: str, message: str, **headers: str) -> ApiError:
    return ApiError(
        503,
        f"{message}; try again in {_RETRY_AFTER_S} s",
        code=code,
        headers={"Retry-After": _RETRY_AFTER_S, **headers},
    )


def _duration(time_s: float) -> str:
    """As OpenAI writes it: 20ms, 7s, 1m0s."""
    if time_s < 1:
        return f"{math.ceil(time_s * 1000)}ms"
    minutes, seconds = divmod(math.ceil(time_s), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
