"""The training recipe: everything that decides what a breaker becomes, in one frozen object.

A recipe is data: a TOML file of this package (`recipes/<name>.toml`) or of the user, parsed once at
the edge and passed down. Fields left out take the defaults below, which are those of the built-in
model. Depths are fractions of the decoder, so that one recipe fits models of any number of blocks.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import ConfigError

__all__ = [
    "DataRecipe",
    "LoraRecipe",
    "ObjectiveRecipe",
    "ProbeRecipe",
    "Recipe",
    "layer_at_depth",
    "load_recipe",
    "recipe_names",
]

Depth = Annotated[FiniteFloat, Field(gt=0, lt=1)]
"""Share of the decoder's blocks that have run at a block's output; 2/3 of 30 blocks is block 19."""
Fraction = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Tokens = Literal["response", "all"]
"""Tokens that enter a mean: the assistant's last message, or every token but padding."""

# The adapter does not depend on these.
_NOT_TRAINING = {"checkpoint_every", "probe", "data"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraRecipe(_Frozen):
    """The adapter. The published setting is rank 16, alpha 16, dropout 0.05, from block 0 on."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[int, Field(ge=1)] = 16
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    """0 makes a step on a CPU about a third faster than the published 0.05."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Names of the linear modules that get an adapter, as PEFT matches them; "all-linear": every
    linear module of a block, found by type (GPT-2's Conv1D included)."""
    b_init_std: Positive = 0.005
    """Standard deviation of the B matrices at the start. Zero, LoRA's usual start, is refused: the
    adapted and the base stream would be equal, where the gradient of their cosine vanishes."""
    first_depth: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.0
    """Blocks up to this depth get no adapter; both streams share their output, computed once."""


class ObjectiveRecipe(_Frozen):
    """The two losses of Representation Rerouting and their balance (objective.py)."""

    alpha: Positive = 10.0
    """Common scale of the two scheduled coefficients."""
    retain: Literal["absolute", "relative"] = "relative"
    """absolute: the paper's L2 norm, tied to the scale of the residual stream; relative: the error
    as a share of the base norm, smooth at zero, the same on every model."""
    retain_weight: Positive = 5.0
    """Multiplies the retain loss, on top of the schedule; 1 in the paper."""
    retain_smoothing: Positive = 0.1
    """Relative error below which the relative retain loss turns from linear to quadratic."""
    retain_layers: Literal["targets", "all"] = "targets"
    """Blocks whose output is retained; "all" is the paper's, and can be cheated: the target layers
    may break for every input while the mean over all layers still looks good."""
    retain_tokens: Tokens = "all"
    reroute_tokens: Tokens = "response"
    """Template tokens are the same in benign and harmful conversations, and a causal model cannot
    tell them apart: rerouting "all" (the paper's choice) sets the two losses against each other."""


class ProbeRecipe(_Frozen):
    """The linear probe: where it may sit, how it is fitted, what it must hold."""

    candidate_depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = (
        0.5,
        0.57,
        0.63,
        0.7,
        0.77,
        0.83,
    )
    """Blocks tried; the best on the selection split is kept."""
    concatenations: tuple[Literal["neighbours", "all"], ...] = ("neighbours", "all")
    """Blocks also tried together, as one probe that reads several: each two candidates next to each
    other, or all of them. Every block that is read costs a small matrix product when served."""
    aggregations: Annotated[tuple[Aggregation, ...], Field(min_length=1)] = (
        Aggregation(kind="ema", alpha=0.12),
        Aggregation(kind="rolling_mean", window=16),
        Aggregation(kind="max"),
    )
    """Ways tried to turn token logits into a running score."""
    l2_C: Positive = 1e-3
    """Inverse strength of the L2 penalty of the logistic regression."""
    tokens_per_conversation: Annotated[int, Field(ge=1)] | None = 32
    """Tokens of one conversation used in the fit, drawn at random from prompt and response; none
    means all, which takes several times the disk and the time: neighbours are nearly equal."""
    target_fpr: Fraction = 0.01
    """Share of benign conversations that may trip, as an upper bound."""
    fpr_ladder: tuple[Fraction, ...] = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    """Promises whose thresholds are stored next to that of `target_fpr`, for servers to choose
    from; those that the calibration split cannot support are left out."""
    long_conversations: Annotated[int, Field(ge=0)] = 16
    """Test conversations of about 4,000 tokens that are put together and scored; 0 for none."""
    confidence: Fraction = 0.95
    """Confidence of that bound (Clopper-Pearson)."""


class DataRecipe(_Frozen):
    """The conversations that `data build` writes when the user brings none."""

    seed: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Length limit of a generated completion, in tokens."""
    blank_prompt_share: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    """Share of the harmful training conversations whose user turn is blanked when the adapter is
    trained, so that it reroutes the response whatever was asked; 0.5 in the paper's Llama-3 run."""


class Recipe(_Frozen):
    """How to train one breaker."""

    model: Annotated[str, Field(min_length=1)]
    """Built-in name, hub id or directory of the base model."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides adapter initialisation, dropout and the order of the conversations."""

    target_depth: Depth = 2 / 3
    """Depth of the block whose output is rerouted."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """0-based blocks to reroute; overrides `target_depth`."""

    steps: Annotated[int, Field(ge=1)] = 150
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Conversations a step of EACH kind: this many benign and this many harmful."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens a conversation, prompt and response; longer ones are cut at the end and counted."""
    learning_rate: Positive = 1e-3
    """Peak rate of AdamW. About 1e-3 for 135M parameters, 1e-4 for 8B."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate moves from its peak: to zero over all steps, or not at all."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global L2 norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: base weights and matrix products in bfloat16, adapter weights and losses in float32."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Conversations of each kind that one process runs at once; gradients of a step's parts are
    added up, and the losses are those of the whole batch. None runs a process's share at once."""
    gradient_checkpointing: bool = False
    """Keep block inputs only and run each block again in the backward pass: less memory, a third
    more time."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: base weights in 4 bits by bitsandbytes, on a GPU only."""
    compile: bool = False
    """torch.compile the blocks."""
    chat_template: Literal["model", "plain"] = "model"
    """model: the tokenizer's own; plain: for base models without one, turns one below the other."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 25
    """Steps between two checkpoints; a killed run loses at most this many."""

    lora: LoraRecipe = LoraRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    probe: ProbeRecipe = ProbeRecipe()
    data: DataRecipe = DataRecipe()

    @model_validator(mode="after")
    def _layers_differ(self) -> Recipe:
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers)
        ):
            raise ValueError(
                f"layers is {list(self.layers)}; expected at least one block, each once; "
                "leave it out to use target_depth"
            )
        return self

    def target_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based blocks to reroute in a model of `num_layers` blocks, ascending.

        Raises:
            ConfigError: a block is not in the model, or is its last one.
        """
        if self.layers is None:
            return (layer_at_depth(self.target_depth, num_layers),)
        if max(self.layers) > num_layers - 2:
            raise ConfigError(
                f"layers is {list(self.layers)}, but a model of {num_layers} blocks allows 0 to "
                f"{num_layers - 2}; leave layers out and use target_depth to fit any model"
            )
        return tuple(sorted(self.layers))

    def adapted_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based blocks that get an adapter: from `lora.first_depth` to the deepest target.

        Raises:
            ConfigError: no block is left between the two depths.
        """
        top = max(self.target_layers(num_layers))
        first = round(self.lora.first_depth * num_layers)
        if first > top:
            raise ConfigError(
                f"lora.first_depth {self.lora.first_depth} starts the adapter at block {first}, "
                f"above the deepest target, block {top}; lower first_depth or raise the target"
            )
        return tuple(range(first, top + 1))

    def training_digest(self) -> str:
        """sha256 of the fields that decide the adapter, for telling whether a run may go on."""
        fields = self.model_dump(mode="json", exclude=_NOT_TRAINING)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def layer_at_depth(depth: float, num_layers: int) -> int:
    """0-based block at whose output a share `depth` of the decoder has run.

    The last block is never returned: its HF hidden state is taken after the final norm.
    """
    assert 0 < depth < 1 and num_layers >= 2
    return min(max(round(depth * num_layers) - 1, 0), num_layers - 2)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with this package."""
    files = resources.files(__package__).joinpath("recipes").iterdir()
    return tuple(sorted(f.name[: -len(".toml")] for f in files if f.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name in this package, or of that TOML file.

    Raises:
        ConfigError: no such recipe, not TOML, or a field is unknown, missing or out of range.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(
                f"recipe file {str(path)!r} does not exist; expected a TOML file or one of the "
                f"names {', '.join(recipe_names())}"
            )
        raw = path.read_bytes()
    elif str(name_or_path) in recipe_names():
        raw = resources.files(__package__).joinpath("recipes", f"{path}.toml").read_bytes()
    else:
        raise ConfigError(
            f"got recipe {str(name_or_path)!r}, expected one of {', '.join(recipe_names())} or a "
            "path ending in .toml; write a recipe file for another model"
        )
    try:
        fields = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe {str(name_or_path)!r} is not TOML: {error}; expected UTF-8 `field = value` "
            "lines; correct the file at that place"
        ) from error
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(str(name_or_path), error)) from error


def _explain(source: str, error: ValidationError) -> str:
    """Every broken field of a recipe with what was got and expected."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "missing":
            lines.append(f"{field} is missing; expected a value; add it")
        elif item["type"] == "extra_forbidden":
            lines.append(f"{field} is not a field of a recipe; remove it or correct its name")
        else:
            lines.append(f"{field} = {item['input']!r}: {item['msg']}; change it")
    return f"recipe {source!r} is not valid: " + " | ".join(lines)
