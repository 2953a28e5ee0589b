"""What the server says about itself: the model it serves and the breaker in it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from circuit_breakers.api.access import Caller
from circuit_breakers.api.errors import ApiError, not_ready
from circuit_breakers.policies.served_policy import ServedPolicy

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Serving

__all__ = ["breaker_json", "model_json", "models_json"]


def models_json(serving: Serving, caller: Caller) -> dict[str, Any]:
    """The body of GET /v1/models: the model that is served, and its LoRAs, as far as the caller
    may use them."""
    created = serving.guarded.breaker.manifest.created
    names = [serving.model_name, *serving.guarded.loras]
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": int(created.timestamp()),
                "owned_by": "circuit-breakers",
                "max_model_len": serving.max_model_len,
                **({} if name == serving.model_name else {"parent": serving.model_name}),
            }
            for name in names
            if caller.may_use(name)
        ],
    }


def model_json(serving: Serving, caller: Caller, name: str) -> dict[str, Any]:
    """The body of GET /v1/models/NAME.

    Raises:
        ApiError: 404, there is no such model.
    """
    models: list[dict[str, Any]] = models_json(serving, caller)["data"]
    for model in models:
        if model["id"] == name:
            return model
    raise ApiError(
        404,
        f"got model {name!r}, expected one of {', '.join(m['id'] for m in models)}",
        code="model_not_found",
        param="model",
    )


def breaker_json(serving: Serving, caller: Caller) -> dict[str, Any]:
    """The body of GET /v1/breaker: which breaker is live, and how it judges the caller's requests.

    An admin sees all policies.

    Raises:
        ApiError: 503, the caller came before the engine was there.
    """
    if caller.policy is None or caller.book is None:
        raise not_ready("no policy is in force yet")
    breaker = serving.guarded.breaker
    manifest = breaker.manifest
    body = {
        "object": "breaker",
        "name": manifest.name,
        "digest": breaker.digest,
        "created": manifest.created.isoformat(),
        "calibration_age_s": int(time.time() - manifest.created.timestamp()),
        "base_model": manifest.base_model.model_dump(mode="json"),
        **_policy_json(caller.policy),
    }
    if caller.is_admin:
        policies = caller.book.policies.values()
        body["policies"] = [_policy_json(served) for served in policies]
    return body


def _policy_json(served: ServedPolicy) -> dict[str, Any]:
    policy = served.policy
    # The same in every probe that was calibrated together with the others.
    in_force = policy.probes[0].calibration
    # Thresholds of the operator's own, and means of the completion alone, rest on no calibration.
    unknown = None if served.keeps_promise else {"calibration"}
    return {
        "mode": policy.mode,
        "policy": policy.name,
        "action": served.action,
        "phases": sorted(policy.phases),
        "judged": [
            probe.name
            for probe, judges in zip(policy.probes, policy.judges_K, strict=True)
            if judges
        ],
        "operating_point": in_force.model_dump(mode="json", exclude={"curve", "histogram"})
        if served.keeps_promise
        else None,
        "probes": [
            probe.model_dump(mode="json", exclude_none=True, exclude=unknown)
            for probe in policy.probes
        ],
    }
