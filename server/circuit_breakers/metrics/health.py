"""Whether the server is ready, and what its canaries say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from circuit_breakers.metrics import series

__all__ = ["HealthMetrics"]


class HealthMetrics:
    """The series, in the registry they are given."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        is_ready: Callable[[], bool],
        canary_interval_s: float,
    ) -> None:
        series.READY.register(registry).set_function(lambda: float(is_ready()))
        self._ok = series.CANARY_OK.register(registry)
        self._failures = series.CANARY_FAILURES.register(registry)
        self._last_run = series.CANARY_LAST_RUN.register(registry)
        series.CANARY_INTERVAL.register(registry).set(canary_interval_s)
        # A 0 would look like a failure while the model loads.
        self._ok.set(math.nan)
        self._last_run.set(math.nan)

    def record_canaries(self, *, passed: bool) -> None:
        """Counts a run of all canaries."""
        self._ok.set(passed)
        self._last_run.set(time.time())
        if not passed:
            self._failures.inc()
