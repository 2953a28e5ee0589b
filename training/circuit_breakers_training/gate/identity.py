"""Whether the server has this very breaker, enforces it, and never saw the test data."""

from __future__ import annotations

from circuit_breakers_training.data.overlap import overlapping
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.evaluation.held_out import read_digests
from circuit_breakers_training.gate.rows import Row
from circuit_breakers_training.gate.target import Target

__all__ = ["identity"]

_SERVER = "GET /v1/breaker"


def identity(target: Target) -> list[Row]:
    """Digest, mode, readiness and overlap."""
    ready = target.server.ask("GET", "/readyz")
    if ready.status == 404:
        # vLLM's own server has another name for it, and listens only after the canaries passed.
        ready = target.server.ask("GET", "/health")
    return [
        Row(
            name="digest",
            what="breaker in the server, by its manifest's SHA-256",
            count=1,
            value=target.served["digest"],
            expected=target.breaker.digest,
            source=_SERVER,
        ),
        Row(
            name="mode",
            what="what a trip does under the policy of the key",
            count=1,
            value=str(target.served.get("mode")),
            expected="enforce",
            source=_SERVER,
        ),
        Row(
            name="ready",
            what="whether the server says that its canaries passed",
            count=1,
            value=f"HTTP {ready.status}",
            expected="HTTP 200",
            source="GET /readyz, or /health",
        ),
        _overlap(target),
    ]


def _overlap(target: Target) -> Row:
    """Test requests that the breaker was made from; unknown where it does not say which."""
    requests = list(dict.fromkeys(row.prompt for row in target.dataset.test))
    digests = read_digests(target.breaker, target.dataset)
    seen = None
    if digests is not None:
        made_from = {digest for split in SPLITS[:-1] for digest in digests[split]}
        seen = len(overlapping(made_from, requests))
    return Row(
        name="overlap",
        what="test requests that training, selection or calibration saw",
        count=0 if seen is None else len(requests),
        value=seen,
        bar=target.bars["identity.overlap"],
        source="digests in the artifact",
        notes=("the breaker does not say which prompts it was made from",) if seen is None else (),
    )
