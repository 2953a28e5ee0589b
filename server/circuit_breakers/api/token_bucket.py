"""A token bucket: a steady rate, and some at once after a pause.

Our own, since no library at hand has one that refuses and tells when to come back: `limits` counts
windows, which let twice the rate through at their edges, and `aiolimiter` makes the caller wait.
"""

from __future__ import annotations

import math

__all__ = ["TokenBucket"]

_MINUTE_S = 60.0
_ROUNDING = 1e-9


class TokenBucket:
    """Gets `per_minute` tokens a minute and holds `burst`, or a minute's; starts full.

    Its whole state is the time at which it will be full again.
    """

    def __init__(self, per_minute: int, burst: int | None = None) -> None:
        self.per_minute = per_minute
        self.burst = burst
        """May be changed at any time; what was taken stays taken, as a share of a minute."""
        self._full_at_s = -math.inf

    def full_in_s(self, now_s: float) -> float:
        """Seconds until the bucket is full."""
        return max(0.0, self._full_at_s - now_s)

    def token_in_s(self, now_s: float) -> float:
        """Seconds until there is a token; 0 when there is one."""
        wait_s = self.full_in_s(now_s) + self._interval_s - self._size_s
        return wait_s if wait_s > _ROUNDING else 0.0

    def remaining(self, now_s: float) -> int:
        """Whole tokens."""
        return max(0, int((self._size_s - self.full_in_s(now_s)) / self._interval_s + _ROUNDING))

    def take(self, now_s: float) -> None:
        """Takes one token, which must be there."""
        assert self.token_in_s(now_s) == 0, "the bucket is empty"
        self._full_at_s = now_s + self.full_in_s(now_s) + self._interval_s

    @property
    def _interval_s(self) -> float:
        return _MINUTE_S / self.per_minute

    @property
    def _size_s(self) -> float:
        """Seconds in which an empty bucket gets full."""
        return _MINUTE_S if self.burst is None else self.burst * self._interval_s
