"""The training recipe: everything that decides what a breaker becomes, in one frozen object.

A recipe is data: a TOML file (files.py), resolved once at the edge (resolution.py) and
passed down. Fields left out take the defaults below, which are those of the built-in model. Depths
are fractions of the decoder, so that one recipe fits models of any number of blocks.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.errors import ConfigError

__all__ = [
    "ChatTemplate",
    "DataRecipe",
    "LoraRecipe",
    "ObjectiveRecipe",
    "ProbeRecipe",
    "Recipe",
    "layer_at_depth",
]

Depth = Annotated[FiniteFloat, Field(gt=0, lt=1)]
"""Share of the decoder's blocks that have run at a block's output; 2/3 of 30 blocks is block 19."""
Fraction = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Tokens = Literal["response", "last_turn", "all"]
"""Tokens that enter a mean: the assistant's last message, that with the user's turn before it, or
every token but padding."""
ChatTemplate = Literal["model", "plain"]
"""model: the tokenizer's own; plain: render.PLAIN_TEMPLATE, for base models without one."""

# The adapter does not depend on these, but for data.blank_prompt_share, and for the order of sums:
# a run may go on with other parts, as it may with another number of processes.
_NOT_TRAINING = {
    *("notes", "checkpoint_every", "probe", "data"),
    *("micro_batch_size", "gradient_checkpointing"),
}


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
    """Where a harmful request was refused in an earlier turn, "all" retains the very tokens that a
    harmful conversation starts with, and sets the two losses against each other; "last_turn"
    retains the harmless turn that follows."""
    retain_refusals: bool = True
    """Whether written refusals of harmful requests (source "refusal") are retained. For models that
    refuse; to another one they are foreign texts behind the very requests whose answers are
    rerouted, and set the two losses against each other."""
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
    concatenations: tuple[Literal["neighbours", "all"], ...] = ("all",)
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
    max_fit_gib: Positive = 16.0
    """Memory in GiB that the hidden states of one candidate may take in the fit. Where all tokens
    asked for would take more, every conversation gives equally many fewer. All candidates' lie on
    the disk meanwhile, which is about as many times more as there are aggregations."""
    target_fpr: Fraction = 0.01
    """Share of benign conversations that may trip, as an upper bound."""
    fpr_ladder: tuple[Fraction, ...] = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    """Promises whose thresholds are stored next to that of `target_fpr`, for servers to choose
    from; those that the calibration split cannot support are left out."""
    long_conversations: Annotated[int, Field(ge=0)] = 16
    """Test conversations of about 4,000 tokens that are put together and scored; 0 for none."""
    confidence: Fraction = 0.95
    """Confidence of that bound (Clopper-Pearson)."""

    def candidate_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based blocks that the probe may read in a model of `num_layers` blocks, ascending."""
        return tuple(sorted({layer_at_depth(d, num_layers) for d in self.candidate_depths}))


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
    notes: str = ""
    """What the recipe is for, and where and why it leaves its source; for people."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides adapter initialisation, dropout, the order of the conversations and blank prompts."""

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
    """bf16: base weights and matrix products in bfloat16, adapter weights and losses in float32.
    fp32: all of it in float32. A recipe file may say "auto": fp32 on a CPU that is several times
    slower at bfloat16 (hardware.py), bf16 elsewhere."""
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
    chat_template: ChatTemplate = "model"
    """How a conversation becomes text, in training and in serving."""
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

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Recipe:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; expected at most batch_size, "
                f"{self.batch_size}; lower it or leave it out"
            )
        return self

    def check_runs(self, *, num_layers: int, max_positions: int, device: str) -> None:
        """Pass if a model of that shape can be trained by this recipe on that kind of device.

        Args:
            max_positions: longest context of the model in tokens.
            device: "cpu" or "cuda".
        Raises:
            ConfigError: naming the field that has to change.
        """
        self.adapted_layers(num_layers)
        if self.max_length > max_positions:
            raise ConfigError(
                f"max_length is {self.max_length}, expected at most {max_positions}, the model's "
                "context in tokens; lower max_length"
            )
        if self.quantization == "nf4" and device != "cuda":
            raise ConfigError(
                f"quantization is 'nf4' on device {device!r}, expected 'cuda': 4-bit weights run "
                'on a CUDA GPU only; set quantization to "none" or train on such a machine'
            )

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
                f"{num_layers - 2}; leave layers out and use target_depth to fit any model, as the "
                "recipe auto does"
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
        fields["blank_prompt_share"] = self.data.blank_prompt_share
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def layer_at_depth(depth: float, num_layers: int) -> int:
    """0-based block at whose output a share `depth` of the decoder has run.

    The last block is never returned: its HF hidden state is taken after the final norm.
    """
    assert 0 < depth < 1 and num_layers >= 2
    return min(max(round(depth * num_layers) - 1, 0), num_layers - 2)
