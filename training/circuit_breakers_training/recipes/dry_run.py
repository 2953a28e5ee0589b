"""What a training would do, said before it does it: nothing is downloaded, no weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.blank_prompts import blank_prompts
from circuit_breakers_training.adapter.retain_set import retain_set
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.probe.fit_plan import FitPlan, plan_fit, reduced_text, token_bytes
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.recipes.memory import TrainingShape, training_shape
from circuit_breakers_training.render import load_tokenizer, render_all

__all__ = ["DataSummary", "DryRun", "dry_run"]


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """A dataset as a training would use it."""

    counts: Mapping[str, Mapping[str, int]]
    """Conversations by split, then by "label: source"."""
    num_refusals_left_out: int
    """Benign training conversations that the recipe does not retain."""
    num_blanked: int
    """Harmful training conversations whose last user turn would be blank."""
    num_truncated: int
    """Training conversations that max_length cuts."""
    num_dropped: int
    """Training conversations of which max_length leaves no response."""
    max_tokens: int
    """Of the longest training conversation."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A training that was not done."""

    recipe: Recipe
    shape: TrainingShape
    device: str
    """Kind of device that it would run on."""
    data: DataSummary | None
    """None where the data are yet to be built."""
    fit: FitPlan | None
    """What the probe would be fitted on; None without data, and where that is refused."""
    refusal: str | None
    """Why it would be refused at its start."""

    @property
    def target_layers(self) -> tuple[int, ...]:
        return self.recipe.target_layers(self.shape.num_layers)

    @property
    def adapted_layers(self) -> tuple[int, ...]:
        return self.recipe.adapted_layers(self.shape.num_layers)

    @property
    def candidate_layers(self) -> tuple[int, ...]:
        return self.recipe.probe.candidate_layers(self.shape.num_layers)

    @property
    def max_tokens(self) -> int:
        """Of one conversation: the longest one's, or max_length where no data are there yet."""
        return self.recipe.max_length if self.data is None else self.data.max_tokens

    @property
    def max_tokens_per_step(self) -> int:
        """Of both kinds of conversations."""
        return 2 * self.recipe.batch_size * self.max_tokens

    def describe(self) -> str:
        """All of it for people, a line each."""
        recipe, shape, memory = self.recipe, self.shape, self.shape.memory
        first, last = self.adapted_layers[0], self.adapted_layers[-1]
        rows = [
            (
                "base model",
                f"{recipe.model}: {shape.architecture}, {shape.num_layers} blocks, width "
                f"{shape.hidden_size}, {shape.num_base:,} parameters",
            ),
            ("device", f"{self.device}, {_precision(recipe)}"),
            ("target layers", ", ".join(map(str, self.target_layers))),
            ("adapted layers", f"{first} to {last}"),
            ("modules", ", ".join(shape.modules)),
            (
                "trained",
                f"{shape.num_trained:,} parameters, "
                f"{100 * shape.num_trained / shape.num_base:.2g} % of the base model's",
            ),
            ("probe candidates", f"layers {', '.join(map(str, self.candidate_layers))}"),
            (
                "steps",
                f"{recipe.steps} of {recipe.batch_size} benign and {recipe.batch_size} harmful "
                f"conversations, at most {self.max_tokens_per_step:,} tokens",
            ),
            (
                "memory, estimated",
                f"{_size(memory.peak)}: the larger of {_size(memory.loading)} while loading, and "
                f"{_size(memory.weights)} weights + {_size(memory.adapter)} adapter, gradients and "
                f"AdamW + {_size(memory.activations)} activations",
            ),
            (
                "",
                f"counted on shapes for conversations of {self.max_tokens} tokens; temporary "
                "buffers, the allocator's slack and the process itself come on top",
            ),
            ("probe, estimated", self._describe_fit()),
            *_data_rows(recipe, self.data),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        if self.fit is not None and self.fit.is_reduced:
            lines.append(reduced_text(recipe.probe, self.fit))
        if self.refusal is not None:
            lines.append(f"would be refused: {self.refusal}")
        return "\n".join(lines)

    def _describe_fit(self) -> str:
        """Memory and disk of the probe's fit."""
        recipe, shape = self.recipe.probe, self.shape
        memory, disk = token_bytes(
            recipe, num_layers=shape.num_layers, hidden_size=shape.hidden_size
        )
        if self.fit is not None:
            num = self.fit.num_tokens
            return (
                f"{_size(num * memory)} of memory and {_size(num * disk)} of disk, beside the "
                f"merged model: {num:,} tokens of {len(self.fit.kept):,} conversations, at most "
                f"{self.fit.tokens_per_conversation} of each"
            )
        num = 1000 * (recipe.tokens_per_conversation or self.recipe.max_length)
        limit = int(recipe.max_fit_gib * 2**30)
        return (
            f"{_size(num * memory)} of memory and {_size(num * disk)} of disk for each 1,000 "
            f"training conversations, at most {_size(limit)} and {_size(limit // memory * disk)}, "
            "beside the merged model"
        )


def dry_run(recipe: Recipe, model_dir: Path, *, data_dir: Path | None, device: str) -> DryRun:
    """The training that `recipe` would be.

    Args:
        model_dir: directory of the base model, of which config.json is read.
        data_dir: a built dataset; None where one would be built for the model.
        device: "cpu" or "cuda".
    Raises:
        ModelError: the config cannot be read, or is not that of a decoder.
        DataError: the dataset cannot be read.
        ConfigError: layers or adapter modules do not exist in this model.
    """
    dataset, tokenizer, data = None, None, None
    if data_dir is not None:
        dataset = load_dataset(data_dir)
        tokenizer = load_tokenizer(model_dir, recipe.chat_template)
        data = _summary(recipe, tokenizer, dataset)
    num_tokens = recipe.max_length if data is None else data.max_tokens
    shape = training_shape(recipe, model_dir, num_tokens=num_tokens)
    fit, refusal = None, None
    try:
        recipe.check_runs(
            num_layers=shape.num_layers, max_positions=shape.max_positions, device=device
        )
        if dataset is not None:
            fit = _planned_fit(recipe, tokenizer, dataset, shape)
    except ConfigError as error:
        refusal = str(error)
    return DryRun(recipe=recipe, shape=shape, device=device, data=data, fit=fit, refusal=refusal)


def _planned_fit(recipe: Recipe, tokenizer: Any, dataset: Dataset, shape: TrainingShape) -> FitPlan:
    rendered = render_all(tokenizer, dataset.train, max_length=recipe.max_length)
    return plan_fit(
        [dataset.train[i] for i in rendered.kept],
        rendered.rows,
        recipe.probe,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
    )


def _summary(recipe: Recipe, tokenizer: Any, dataset: Dataset) -> DataSummary:
    counts = {}
    for split in SPLITS:
        names = Counter(f"{c.label}: {c.source}" for c in getattr(dataset, split))
        counts[split] = dict(sorted(names.items()))
    benign = retain_set(dataset.train, recipe)
    blanked = blank_prompts(
        [c for c in dataset.train if c.label == "harmful"],
        share=recipe.data.blank_prompt_share,
        seed=recipe.seed,
        tokenizer=tokenizer,
    )
    rendered = render_all(
        tokenizer, [*benign, *blanked.conversations], max_length=recipe.max_length
    )
    num_refusals = sum(c.label == "benign" for c in dataset.train) - len(benign)
    return DataSummary(
        counts=counts,
        num_refusals_left_out=num_refusals,
        num_blanked=blanked.num_blanked,
        num_truncated=rendered.num_truncated,
        num_dropped=rendered.num_dropped,
        max_tokens=max((len(row.ids) for row in rendered.rows), default=recipe.max_length),
    )


def _data_rows(recipe: Recipe, data: DataSummary | None) -> list[tuple[str, str]]:
    if data is None:
        return [
            (
                "data",
                f"none given: would be built for the model, seed {recipe.data.seed}, texts of at "
                f"most {recipe.data.max_new_tokens} tokens",
            )
        ]
    rows = [
        (f"data, {split}", ", ".join(f"{name} {count}" for name, count in parts.items()))
        for split, parts in data.counts.items()
    ]
    lost = (
        f"training conversations: {data.num_refusals_left_out} refusals not retained, "
        f"{data.num_blanked} with a blank prompt, {data.num_truncated} cut at max_length, "
        f"{data.num_dropped} left out"
    )
    return [*rows, ("", lost)]


def _precision(recipe: Recipe) -> str:
    if recipe.quantization == "none":
        return recipe.precision
    return f"{recipe.precision} with base weights in {recipe.quantization}"


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / (1 << 30):.1f} GiB"
