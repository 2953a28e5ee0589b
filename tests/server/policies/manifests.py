"""Manifests of breakers with given probes, without any file behind them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from circuit_breakers.artifact.manifest import (
    Aggregation,
    BaseModelSpec,
    Calibration,
    Canary,
    Manifest,
    Message,
    OperatingPoint,
    ProbeSpec,
)

MAX = Aggregation(kind="max")
EMA = Aggregation(kind="ema", alpha=0.4)
MEAN = Aggregation(kind="rolling_mean", window=3)


def curve(threshold: float) -> tuple[OperatingPoint, ...]:
    """The breaker's own promise of 1 %, and one of 5 % at a threshold lower by 1."""
    # Clopper-Pearson bounds of 8 and 0 trips in 300.
    points = ((0.05, threshold - 1, 8, 0.04761), (0.01, threshold, 0, 0.00994))
    return tuple(
        OperatingPoint(
            target_fpr=target,
            threshold_logit=logit,
            num_conversations=300,
            num_trips=trips,
            fpr_upper_bound=bound,
        )
        for target, logit, trips, bound in points
    )


def manifest(
    thresholds: Sequence[float] = (4.0, 6.0), aggregations: Sequence[Aggregation] = (MAX, MAX)
) -> Manifest:
    """A breaker with probes p0, p1, ..."""
    probes = tuple(
        ProbeSpec(
            name=f"p{k}",
            layer=k,
            aggregation=aggregation,
            threshold_logit=threshold,
            calibration=Calibration(
                target_fpr=0.01,
                num_conversations=300,
                num_trips=0,
                fpr_upper_bound=0.00994,
                max_tokens=64,
                curve=curve(threshold),
            ),
        )
        for k, (threshold, aggregation) in enumerate(zip(thresholds, aggregations, strict=True))
    )
    message = (Message(role="user", content="x"),)
    return Manifest(
        schema_version=1,
        name="b",
        base_model=BaseModelSpec(
            id="m", revision=None, config_sha256="0" * 64, num_layers=9, hidden_size=8
        ),
        created=datetime.now(UTC),
        recipe={},
        data_sha256={},
        probes=probes,
        canaries=(
            Canary(messages=message, label="harmful"),
            Canary(messages=message, label="benign"),
        ),
        files={},
    )
