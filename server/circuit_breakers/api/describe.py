"""What the server says about itself: the model it serves and the breaker in it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from circuit_breakers.api.errors import ApiError

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Serving

__all__ = ["breaker_json", "model_json", "models_json"]


def models_json(serving: Serving) -> dict[str, Any]:
    """The body of GET /v1/models: the model that is served, and its LoRAs."""
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
        ],
    }


def model_json(serving: Serving, name: str) -> dict[str, Any]:
    """The body of GET /v1/models/NAME.

    Raises:
        ApiError: 404, there is no such model.
    """
    models: list[dict[str, Any]] = models_json(serving)["data"]
    for model in models:
        if model["id"] == name:
            return model
    raise ApiError(
        404,
        f"got model {name!r}, expected one of {', '.join(m['id'] for m in models)}",
        code="model_not_found",
        param="model",
    )


def breaker_json(serving: Serving) -> dict[str, Any]:
    """The body of GET /v1/breaker: which breaker is live, and what its thresholds rest on."""
    guarded = serving.guarded
    breaker = guarded.breaker
    manifest = breaker.manifest
    # The same in every probe that was calibrated together with the others.
    in_force = guarded.policy.probes[0].calibration
    return {
        "object": "breaker",
        "name": manifest.name,
        "digest": breaker.digest,
        "created": manifest.created.isoformat(),
        "calibration_age_s": int(time.time() - manifest.created.timestamp()),
        "base_model": manifest.base_model.model_dump(mode="json"),
        "mode": guarded.mode,
        "policy": guarded.policy.name,
        "operating_point": in_force.model_dump(mode="json", exclude={"curve"}),
        "probes": [
            probe.model_dump(mode="json", exclude_none=True) for probe in guarded.policy.probes
        ],
    }
