"""The manifest of a breaker artifact: what training promises and serving checks.

Every model is frozen and forbids unknown fields, so that a manifest written by a newer version is
refused instead of half understood. New fields are optional and left out of the file at their
default: a breaker that does not need them has the bytes that it always had, and older versions
load it. `schema_version` changes when an old field gets another meaning.
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
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
    "OperatingPoint",
    "ProbeSpec",
    "ScoreHistogram",
]

SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""Lower-case label, usable as a metric label and a tensor name prefix."""
Layer = Annotated[int, Field(ge=0)]
"""0-based decoder block whose OUTPUT is read: HF hidden_states[layer + 1]."""
Threshold = Annotated[FiniteFloat, Field(ge=-1e30, le=1e30)]
"""A logit. Scores are float32: a threshold beyond that would be infinite, and nothing reach it."""
NumConversations = Annotated[int, Field(ge=1, le=2**53)]
"""Shares of them are floats."""


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: tuple[object, ...]) -> bool:
    return not value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Aggregation(_Frozen):
    """How the token logits of one stream become one running score (guard/aggregation.py)."""

    kind: Literal["max", "ema", "rolling_mean"]
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """Weight of the newest token; ema only."""
    window: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
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


class OperatingPoint(_Frozen):
    """One promise that the calibration data supports, and the threshold that keeps it."""

    target_fpr: Annotated[float, Field(gt=0, lt=1)]
    threshold_logit: Threshold
    num_conversations: NumConversations
    num_trips: Annotated[int, Field(ge=0)]
    fpr_upper_bound: Annotated[float, Field(gt=0, le=1)]
    """Clopper-Pearson upper bound at the calibration's confidence; within `target_fpr`."""

    @model_validator(mode="after")
    def _keeps_its_promise(self) -> OperatingPoint:
        if self.fpr_upper_bound > self.target_fpr or self.num_trips > self.num_conversations:
            raise ValueError(
                f"got {self.num_trips} trips in {self.num_conversations} conversations with an "
                f"upper bound of {self.fpr_upper_bound}, expected a bound within target_fpr "
                f"{self.target_fpr}"
            )
        return self


class ScoreHistogram(_Frozen):
    """How benign conversations score in one phase, to tell later whether live ones score alike."""

    edges: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    """Ascending logits; bin i holds scores from edges[i - 1] on and below edges[i], and the first
    and the last bin are open."""
    counts: tuple[Annotated[int, Field(ge=0)], ...]
    """Conversations in each bin, by the highest running score of the phase's tokens; one without a
    scored token in the phase is left out."""

    @model_validator(mode="after")
    def _bins_fit_edges(self) -> ScoreHistogram:
        if any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError(f"got edges {list(self.edges)}, expected them ascending, each once")
        if len(self.counts) != len(self.edges) + 1 or not any(self.counts):
            raise ValueError(
                f"got counts {list(self.counts)}, expected {len(self.edges) + 1} of them, one more "
                "than edges, and not all 0"
            )
        return self


class Calibration(_Frozen):
    """What held-out benign conversations say about the threshold.

    A conversation trips when the running score of any of its tokens, prompt or completion, reaches
    the threshold; the false-positive rate is per conversation, not per token. Probes of a breaker
    with a curve were calibrated together: a conversation counts as one trip when any of them trips,
    so the rate is that of the whole breaker, and each probe carries the same counts.
    """

    target_fpr: Annotated[float, Field(gt=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    num_conversations: NumConversations
    num_trips: Annotated[int, Field(ge=0)]
    fpr_upper_bound: Annotated[float, Field(gt=0, le=1)]
    """Clopper-Pearson upper bound of the false-positive rate at `confidence`."""
    max_tokens: Annotated[int, Field(ge=1)]
    """Longest calibrated conversation, prompt and completion; the claim ends there."""
    curve: Annotated[tuple[OperatingPoint, ...], Field(exclude_if=_is_empty)] = ()
    """Promises that a server may choose from, the loosest first; those that the data cannot support
    are not in it."""
    histogram: Annotated[
        dict[Literal["prompt", "completion"], ScoreHistogram] | None, Field(exclude_if=_is_none)
    ] = None
    """Scores of the calibrated conversations under this probe, by phase."""

    @model_validator(mode="after")
    def _histogram_is_of_these_conversations(self) -> Calibration:
        for phase, histogram in (self.histogram or {}).items():
            if sum(histogram.counts) > self.num_conversations:
                raise ValueError(
                    f"got a histogram of {sum(histogram.counts)} conversations in phase {phase}, "
                    f"expected at most the {self.num_conversations} that were calibrated on"
                )
        return self


class ProbeSpec(_Frozen):
    """One linear probe; its logit is the sum over its layers of w_l . h_l, plus a bias.

    Weights in probes.safetensors: `<name>.weight`, (D,) for one layer and (L, D) for several, and
    `<name>.bias` ().
    """

    name: Name
    layer: Annotated[Layer | None, Field(exclude_if=_is_none)] = None
    """The block that is read, for a probe of one."""
    layers: Annotated[tuple[Layer, ...] | None, Field(exclude_if=_is_none)] = None
    """Instead of `layer`: two or more blocks, ascending, in the order of the weight's rows."""
    aggregation: Aggregation
    threshold_logit: Threshold
    """Trips when the running score is >= this."""
    calibration: Calibration

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Every block that is read, ascending."""
        if self.layers is not None:
            return self.layers
        assert self.layer is not None, "the validator wants one of both"
        return (self.layer,)

    @model_validator(mode="after")
    def _reads_one_layer_or_several(self) -> ProbeSpec:
        if (self.layer is None) == (self.layers is None):
            raise ValueError(
                f"got layer {self.layer} and layers {self.layers}, expected exactly one of both: "
                "layer for one block, layers for several"
            )
        if self.layers is not None and (
            len(self.layers) < 2 or any(a >= b for a, b in pairwise(self.layers))
        ):
            raise ValueError(
                f"got layers {list(self.layers)}, expected at least two, each once, ascending; "
                "use layer for a single one"
            )
        return self

    @model_validator(mode="after")
    def _curve_is_in_order(self) -> ProbeSpec:
        curve = self.calibration.curve
        if not curve:
            return self
        if any(
            a.target_fpr <= b.target_fpr or a.threshold_logit > b.threshold_logit
            for a, b in pairwise(curve)
        ):
            raise ValueError(
                "got a curve of "
                f"{[(point.target_fpr, point.threshold_logit) for point in curve]}, expected "
                "falling target_fpr and thresholds that do not fall"
            )
        own = (self.calibration.target_fpr, self.threshold_logit)
        if own not in [(point.target_fpr, point.threshold_logit) for point in curve]:
            raise ValueError(
                f"got no point of target_fpr {own[0]} and threshold {own[1]} in the curve, "
                "expected the probe's own threshold among them"
            )
        return self


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
        if not 1970 <= self.created.year < 9999:
            # Its age is told in seconds since 1970, whatever its time zone.
            raise ValueError(f"got created {self.created.isoformat()}, expected a year from 1970")
        names = [p.name for p in self.probes]
        if len(set(names)) != len(names):
            raise ValueError(f"probe names must be unique; got {names}")
        for p in self.probes:
            # The last block's HF entry is taken after the final norm, so it has no raw stream.
            if (deepest := p.read_layers[-1]) > self.base_model.num_layers - 2:
                raise ValueError(
                    f"probe {p.name!r} reads layer {deepest}; a model of "
                    f"{self.base_model.num_layers} layers allows 0 to "
                    f"{self.base_model.num_layers - 2}"
                )
        if len({tuple(map(_promise, p.calibration.curve)) for p in self.probes}) > 1:
            raise ValueError(
                "probes have curves of different promises; expected the same in each, as probes "
                "of one breaker are calibrated together"
            )
        if {c.label for c in self.canaries} != {"harmful", "benign"}:
            raise ValueError("canaries need at least one 'harmful' and one 'benign'")
        return self


def _promise(point: OperatingPoint) -> tuple[float, int, int, float]:
    return point.target_fpr, point.num_conversations, point.num_trips, point.fpr_upper_bound
