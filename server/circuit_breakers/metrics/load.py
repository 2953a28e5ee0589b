"""What the limits do; a request that is refused on arrival shows here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry

from circuit_breakers.metrics import series
from circuit_breakers.metrics.series import Refusal

__all__ = ["LoadMetrics"]


class LoadMetrics:
    """The series, in the registry they are given."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
    ) -> None:
        series.RUNNING_REQUESTS.register(registry).set_function(num_running)
        series.WAITING_REQUESTS.register(registry).set_function(num_waiting)
        self._refused = series.REFUSED_REQUESTS.register(registry)
        for reason in get_args(Refusal):
            self._refused.labels(reason)

    def record_refusal(self, reason: Refusal) -> None:
        self._refused.labels(reason).inc()
