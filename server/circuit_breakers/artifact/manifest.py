"""The manifest of a breaker artifact: what training promises and serving checks.

Every model is frozen and forbids unknown fields, so that a manifest written by a newer version is
refused instead of half understood.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

__all__ = [
    "SCHEMA_VERSION",
    "Aggregation",
    "BaseModelSpec",
    "Calibration",
    "Canary",
    "Manifest",
    "Message",
    "ProbeSpec",
]

SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""Lower-case label, usable as a metric label and a tensor name prefix."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Aggregation(_Frozen):
    """How the token logits of one stream become one running score (guard/aggregation.py)."""

    kind: Literal["max", "ema", "rolling_mean"]
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """Weight of the newest token; ema only."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Tokens averaged; rolling_mean only."""
    skip_tokens: Annotated[int, Field(ge=1)] = 1
    """Leading positions left out. At least 1: position 0 is an attention sink."""

    @model_validator(mode="after")
    def _parameters_fit_kind(self) -> Aggregation:
        if (self.alpha is not None) != (self.kind == "ema"):
            raise ValueError(f"alpha belongs to kind 'ema' and only there; got kind {self.kind!r}")
        if (self.window is not None) != (self.kind == "rolling_mean"):
            raise ValueError(
                f"window belongs to kind 'rolling_mean' and only there; got kind {self.kind!r}"
            )
        return self


class Calibration(_Frozen):
    """What held-out benign conversations say about the threshold.

    A conversation trips when the running score of any of its tokens, prompt or completion, reaches
    the threshold; the false-positive rate is per conversation.
    """

    target_fpr: Annotated[float, Field(gt=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    num_conversations: Annotated[int, Field(ge=1)]
    num_trips: Annotated[int, Field(ge=0)]
    fpr_upper_bound: Annotated[float, Field(gt=0, le=1)]
    """Clopper-Pearson upper bound of the false-positive rate at `confidence`."""
    max_tokens: Annotated[int, Field(ge=1)]
    """Longest calibrated conversation, prompt and completion; the claim ends there."""


class ProbeSpec(_Frozen):
    """One linear probe: weights `<name>.weight` (D,) and `<name>.bias` () in probes.safetensors."""

    name: Name
    layer: Annotated[int, Field(ge=0)]
    """0-based decoder block whose OUTPUT is read: HF hidden_states[layer + 1]."""
    aggregation: Aggregation
    threshold_logit: FiniteFloat
    """Trips when the running score is >= this."""
    calibration: Calibration


class BaseModelSpec(_Frozen):
    """The model that the breaker was made for."""

    id: str
    """Built-in name, hub id, or the directory name that training was given."""
    revision: str | None
    """Hub commit, or sha256 of a built-in model's source file or of a local directory's weights."""
    config_sha256: Sha256
    """Digest of the architecture-defining part of config.json (models.config_digest)."""
    num_layers: Annotated[int, Field(ge=2)]
    hidden_size: Annotated[int, Field(ge=1)]


class Message(_Frozen):
    role: Literal["system", "user", "assistant"]
    content: str


class Canary(_Frozen):
    """A conversation with a known verdict, run before the server calls itself ready.

    When the last message is the assistant's, it is scored as generated text (prefilled).
    """

    messages: tuple[Message, ...]
    label: Literal["harmful", "benign"]


class Manifest(_Frozen):
    schema_version: Literal[1]
    name: Name
    """Name of the breaker, e.g. smollm2-135m-instruct."""
    base_model: BaseModelSpec
    created: datetime
    recipe: dict[str, JsonValue]
    """The resolved training recipe, as it ran."""
    data_sha256: dict[str, Sha256]
    """Digest of each data file that went in, by split or file name."""
    probes: Annotated[tuple[ProbeSpec, ...], Field(min_length=1, max_length=16)]
    canaries: tuple[Canary, ...]
    files: dict[str, Sha256]
    """sha256 of every other file of the artifact, by relative POSIX path."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [p.name for p in self.probes]
        if len(set(names)) != len(names):
            raise ValueError(f"probe names must be unique; got {names}")
        for p in self.probes:
            # The last block's HF entry is taken after the final norm, so it has no raw stream.
            if p.layer > self.base_model.num_layers - 2:
                raise ValueError(
                    f"probe {p.name!r} reads layer {p.layer}; a model of "
                    f"{self.base_model.num_layers} layers allows 0 to "
                    f"{self.base_model.num_layers - 2}"
                )
        if {c.label for c in self.canaries} != {"harmful", "benign"}:
            raise ValueError("canaries need at least one 'harmful' and one 'benign'")
        return self
