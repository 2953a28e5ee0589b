"""The policy of one request, from the API process to the engine core.

It travels in `SamplingParams.extra_args`, which vLLM passes on untouched: how to judge, as plain
values, for the probes that the engine core has itself. A client cannot set it: what comes from
JSON is a plain dict, and engine/requests.py lets only OwnArgs pass.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from typing import Any

from circuit_breakers.guard.policy import ALL_PHASES, Policy

__all__ = ["OwnArgs", "RequestPolicies", "own_args"]

logger = logging.getLogger("vllm.circuit_breakers")

_KEY = "circuit_breakers"
_FIELDS = {"mode", "thresholds", "phases"}
_MAX_KEPT = 256
"""Policies kept decoded; a file has a few, requests may tighten each in their own way."""


class OwnArgs(dict[str, Any]):
    """`extra_args` that the guard made."""


def own_args(policy: Policy) -> OwnArgs:
    """The `extra_args` under which the engine core judges a request by `policy`."""
    thresholds = [
        float(p.threshold_logit) if judges else None
        for p, judges in zip(policy.probes, policy.judges_K, strict=True)
    ]
    values = {"mode": policy.mode, "thresholds": thresholds, "phases": sorted(policy.phases)}
    return OwnArgs({_KEY: values})


class RequestPolicies:
    """Reads the policies of requests; equal ones are one object."""

    def __init__(self) -> None:
        self._default: Policy | None = None
        self._known: OrderedDict[tuple[Any, ...], Policy] = OrderedDict()

    def of(self, request: Any, default: Policy) -> Policy:
        """The policy that a request is to be judged by: `default` where it brings none.

        A malformed one is a fault of ours. It is logged, and `default` holds; the API process
        judges by the policy that it meant, so nothing gets past that one either.
        """
        params = request.sampling_params
        extra_args = None if params is None else params.extra_args
        if not extra_args or _KEY not in extra_args:
            return default
        if default is not self._default:
            self._default = default
            self._known.clear()
        try:
            key = _checked(extra_args[_KEY], len(default.probes))
        except (TypeError, ValueError) as e:
            logger.error("request %s: malformed policy, %s", request.request_id, e)
            return default
        policy = self._known.get(key)
        if policy is None:
            policy = self._known[key] = _decode(key, default)
            if len(self._known) > _MAX_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return policy


def _checked(values: Any, num_probes: int) -> tuple[Any, ...]:
    """The values as something to look up.

    Raises:
        ValueError: they are not what own_args makes.
    """
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        raise ValueError(f"expected an object with {', '.join(sorted(_FIELDS))}")
    mode, thresholds, phases = values["mode"], values["thresholds"], values["phases"]
    if mode not in ("observe", "enforce"):
        raise ValueError("expected mode observe or enforce")
    if not isinstance(phases, list) or not phases or not ALL_PHASES.issuperset(phases):
        raise ValueError(f"expected phases out of {sorted(ALL_PHASES)}")
    if (
        not isinstance(thresholds, list)
        or len(thresholds) != num_probes
        or all(t is None for t in thresholds)
        or not all(t is None or (isinstance(t, float) and math.isfinite(t)) for t in thresholds)
    ):
        raise ValueError(f"expected {num_probes} thresholds, each a number or none, not all none")
    return mode, tuple(thresholds), tuple(phases)


def _decode(key: tuple[Any, ...], default: Policy) -> Policy:
    mode, thresholds, phases = key
    return dataclasses.replace(
        default,
        mode=mode,
        probes=tuple(
            probe if threshold is None else probe.model_copy(update={"threshold_logit": threshold})
            for probe, threshold in zip(default.probes, thresholds, strict=True)
        ),
        judged=frozenset(
            probe.name
            for probe, threshold in zip(default.probes, thresholds, strict=True)
            if threshold is not None
        ),
        phases=frozenset(phases),
    )
