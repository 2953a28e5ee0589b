"""Prometheus series of the guard, next to vLLM's own on the same /metrics.

    series.py ── every series: name, type, labels, meaning, what must hold
       ├── guard.py, load.py, health.py   what is recorded where
       └── page.py                        docs/metrics.md, by `python -m circuit_breakers.metrics`

Every label comes from a closed set. A trip is never an error; in observe mode the answer is
delivered, so the outcome stays `ok`.
"""

from circuit_breakers.metrics.guard import GuardMetrics, leaked_tokens, was_stopped
from circuit_breakers.metrics.health import HealthMetrics
from circuit_breakers.metrics.load import LoadMetrics
from circuit_breakers.metrics.series import Outcome, Refusal

__all__ = [
    "GuardMetrics",
    "HealthMetrics",
    "LoadMetrics",
    "Outcome",
    "Refusal",
    "leaked_tokens",
    "was_stopped",
]
