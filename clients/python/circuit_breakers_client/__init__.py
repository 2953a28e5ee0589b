"""openai's clients for a server that runs a circuit breaker: every answer has a guard report."""

from __future__ import annotations

from circuit_breakers_client.breaker import (
    Breaker,
    PolicyState,
    ReloadedPolicies,
    Trip,
    TripPage,
    WhatIf,
    WhatIfGroup,
)
from circuit_breakers_client.client import AsyncCircuitBreakers, CircuitBreakers
from circuit_breakers_client.errors import TrippedError, UnguardedError
from circuit_breakers_client.guard import guard_of, token_scores_of
from circuit_breakers_client.report import GuardReport, TokenScore
from circuit_breakers_client.streams import AsyncGuardedStream, GuardedStream
from circuit_breakers_client.tightening import POLICY_HEADER, Tightening, tighten

__all__ = [
    "POLICY_HEADER",
    "AsyncCircuitBreakers",
    "AsyncGuardedStream",
    "Breaker",
    "CircuitBreakers",
    "GuardReport",
    "GuardedStream",
    "PolicyState",
    "ReloadedPolicies",
    "Tightening",
    "TokenScore",
    "Trip",
    "TripPage",
    "TrippedError",
    "UnguardedError",
    "WhatIf",
    "WhatIfGroup",
    "guard_of",
    "tighten",
    "token_scores_of",
]
