"""The breaker artifact: the contract between training and serving.

Imports numpy, pydantic and safetensors only.
"""

from circuit_breakers.artifact.manifest import (
    SCHEMA_VERSION,
    Aggregation,
    BaseModelSpec,
    Calibration,
    Canary,
    Manifest,
    Message,
    OperatingPoint,
    ProbeSpec,
    ScoreHistogram,
)
from circuit_breakers.artifact.store import (
    Breaker,
    builtin_breaker_path,
    load_breaker,
    save_breaker,
)
from circuit_breakers.artifact.tensors import ProbeWeights

__all__ = [
    "SCHEMA_VERSION",
    "Aggregation",
    "BaseModelSpec",
    "Breaker",
    "Calibration",
    "Canary",
    "Manifest",
    "Message",
    "OperatingPoint",
    "ProbeSpec",
    "ProbeWeights",
    "ScoreHistogram",
    "builtin_breaker_path",
    "load_breaker",
    "save_breaker",
]
