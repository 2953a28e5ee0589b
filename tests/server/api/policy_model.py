"""A server's policies, keys and counts as plain values, and what must come of a request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .judging_engine import Client, Fault

__all__ = ["OWN_THRESHOLD", "STRICTNESS", "Model", "Request", "Rule", "Trip"]

STRICTNESS = ("stop", "refuse", "error")
OWN_THRESHOLD = 4.0
"""Of p0 in the breaker itself."""


@dataclass(frozen=True)
class Rule:
    """A policy as the model knows it: what p0 must reach, and what then happens."""

    name: str
    threshold: float = OWN_THRESHOLD
    mode: str = "enforce"
    action: str = "stop"

    def toml(self) -> str:
        own = "" if self.threshold == OWN_THRESHOLD else f"threshold = {self.threshold}\n"
        return f'[policies.{self.name}]\n{own}mode = "{self.mode}"\naction = "{self.action}"\n'

    def loosens(self, own: Rule) -> bool:
        return (
            self.threshold > own.threshold
            or (own.mode == "enforce" and self.mode == "observe")
            or STRICTNESS.index(self.action) < STRICTNESS.index(own.action)
        )


class Trip(NamedTuple):
    """A row of the log."""

    key_id: str
    policy: str
    phase: str
    action: str
    token_index: int


@dataclass
class Request:
    """One chat, as it was sent and as it must end."""

    client: Client
    key_id: str
    rule: Rule
    prompt: float
    scores: list[float | None]
    fault: Fault | None
    streams: bool
    call: Any = None

    def first_trip(self, num_tokens: int) -> int | None:
        """Of the prompt (-1) and the first tokens, the first that trips."""
        for number, score in enumerate([self.prompt, *self.scores[:num_tokens]], start=-1):
            if score is None or score >= self.rule.threshold:
                return number
        return None


@dataclass
class Model:
    """What the server should hold."""

    policies: dict[str, Rule] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Id by key; every key runs under the default but `team`'s."""
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By policy and outcome."""
    trips: list[Trip] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    reloads: Counter[str] = field(default_factory=Counter)
    num_leaked: int = 0
    num_unscored: int = 0
    is_draining: bool = False
    is_dead: bool = False

    def tightened(self, own: Rule, guard: dict[str, Any]) -> Rule | None:
        start = own
        if guard.get("policy", own.name) != own.name:
            if guard["policy"] not in self.policies:
                return None
            start = self.policies[guard["policy"]]
        changes = {name: guard[name] for name in ("mode", "threshold") if name in guard}
        asked = replace(start, **changes)
        return None if asked.loosens(own) else asked

    def refusal(self, key: str, guard: dict[str, Any] | None) -> tuple[int, str] | None:
        """Status and code of a request that does not come to run."""
        if self.keys.get(key) != "team":
            self.refused["unauthenticated"] += 1
            return 401, "invalid_api_key"
        if self.is_draining:
            self.refused["shutting_down"] += 1
            return 503, "shutting_down"
        if self.is_dead:
            self.requests["standard", "error"] += 1
            return 503, "engine_dead"
        own = list(self.policies.values())[-1]
        if self.tightened(own, guard or {}) is None:
            self.requests["standard", "rejected"] += 1
            return 400, "policy_not_allowed"
        return None
