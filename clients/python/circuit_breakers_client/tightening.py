"""A request may ask for a stricter policy than its caller's; the server refuses a looser one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from circuit_breakers_client.report import Mode

__all__ = ["POLICY_HEADER", "Tightening", "tighten"]

POLICY_HEADER = "X-Breaker-Policy"
"""Header with the name of a policy, e.g. for default_headers of a whole client."""


class Tightening(TypedDict):
    """Arguments for any of openai's methods that generate."""

    extra_body: dict[str, object]


def tighten(
    *,
    policy: str | None = None,
    mode: Mode | None = None,
    target_fpr: float | None = None,
    threshold: float | Mapping[str, float] | None = None,
    token_scores: bool | None = None,
) -> Tightening:
    """Arguments that tighten one request: `create(..., **tighten(policy="strict"))`.

    Args:
        policy: name of a policy of the server's, to start from instead of the caller's own.
        mode: "enforce" stops where the caller's policy only observes.
        target_fpr: thresholds that the breaker's calibration proves this share of false trips for.
        threshold: a logit for all probes, or one each by name.
        token_scores: the score of each token, for an admin key: see `token_scores_of`. It tightens
            nothing.
    Raises:
        ValueError: nothing is asked for, or both target_fpr and threshold are.
    """
    if target_fpr is not None and threshold is not None:
        raise ValueError("got target_fpr and threshold, expected one; remove one")
    asked = {
        "policy": policy,
        "mode": mode,
        "target_fpr": target_fpr,
        "threshold": dict(threshold) if isinstance(threshold, Mapping) else threshold,
        "token_scores": token_scores,
    }
    guard = {name: value for name, value in asked.items() if value is not None}
    if not guard:
        raise ValueError(
            "got nothing, expected policy, mode, target_fpr, threshold or token_scores; pass one"
        )
    return {"extra_body": {"guard": guard}}
