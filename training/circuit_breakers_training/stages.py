"""The stages of a training run; pipeline.py says how they follow on each other.

Each takes what earlier ones made and returns plain values, kept in the run's working directory.

Those of the probe are in probe/stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from circuit_breakers.engine.merge import merge_adapter, merge_key
from circuit_breakers.models import ResolvedModel
from circuit_breakers_training.adapter.retain_set import retain_set
from circuit_breakers_training.adapter.trainer import AdapterResult, TrainingRows, train_adapter
from circuit_breakers_training.data.build import build_dataset
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.fluency import LanguageModel, perplexities
from circuit_breakers_training.probe.selection import expected_verdict
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered, render_all, render_prompt
from circuit_breakers_training.work_dir import WorkDir, json_digest, progress_bar

__all__ = [
    "RenderedSplits",
    "Row",
    "Run",
    "SplitLengths",
    "build_data",
    "compare_texts",
    "lost_text",
    "render_splits",
    "text_stratum",
    "train",
    "training_rows",
]

_T = TypeVar("_T")

_HELDOUT_PER_SOURCE = 24
"""Test conversations of each source for cosine and perplexity: enough for two digits."""
_NUM_SHOWN = 5
"""Prompts of each label whose continuations the report shows."""
_SHOWN_TOKENS = 48


class Row(NamedTuple):
    conversation: Conversation
    rendered: Rendered


class SplitLengths(NamedTuple):
    """What max_length does to the conversations of a split."""

    num: int
    num_truncated: int
    """Of these, cut at the end of the response."""
    num_dropped: int
    """Of these, left out, as no response token fits."""


class RenderedSplits(NamedTuple):
    rows: dict[str, list[Row]]
    """Every conversation with a response token within max_length, by split."""
    lengths: dict[str, SplitLengths]
    """By split."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage needs."""

    recipe: Recipe
    model: ResolvedModel
    work: WorkDir
    console: Console | None
    tokenizer: Any
    processes: Processes
    """Those that train the adapter together; all other stages belong to the main one."""

    def candidate_layers(self) -> list[int]:
        """0-based blocks that the probe may read, ascending."""
        return list(self.recipe.probe.candidate_layers(self.model.num_layers))

    def merged_dir(self, adapter: AdapterResult) -> Path:
        """The merged checkpoint, made when a stage first asks for it."""
        path = self.work.path / "merged" / merge_key(self.model, adapter.adapter_dir)
        if not path.is_dir():
            merge_adapter(self.model.path, adapter.adapter_dir, path)
        return path

    def inputs(self, adapter: AdapterResult, dataset: Dataset, **more: Any) -> dict[str, Any]:
        """What the result of a stage after training depends on."""
        return {
            "merged": merge_key(self.model, adapter.adapter_dir),
            "data": dataset.digests,
            "max_length": self.recipe.max_length,
            **more,
        }


def build_data(run: Run) -> Dataset:
    """The recipe's own dataset, with texts by the base model."""
    settings = run.recipe.data
    own = run.work.path / "data"

    # Asked in every run: it knows what its dataset follows from, and finds one that is there.
    built = build_dataset(
        own,
        model=run.recipe.model,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        chat_template=run.recipe.chat_template,
        overwrite=True,
    )
    kept = run.work.stage(
        "data", {"digest": built.summary["digest"]}, lambda: {"seconds": built.seconds}
    )
    run.work.seconds["data"] = kept["seconds"]
    return load_dataset(own)


def render_splits(run: Run, dataset: Dataset) -> RenderedSplits:
    """The dataset as token ids, with what max_length cuts of it."""
    splits = RenderedSplits({}, {})
    for name in SPLITS:
        conversations: Sequence[Conversation] = getattr(dataset, name)
        rendered = render_all(run.tokenizer, conversations, max_length=run.recipe.max_length)
        splits.rows[name] = [
            Row(conversations[index], row)
            for index, row in zip(rendered.kept, rendered.rows, strict=True)
        ]
        splits.lengths[name] = SplitLengths(
            len(conversations), rendered.num_truncated, rendered.num_dropped
        )
    return splits


def lost_text(lengths: Mapping[str, SplitLengths], max_length: int) -> str:
    """What max_length cuts, in a line; empty where it cuts nothing."""
    parts = [
        f"{name} {lost.num_truncated} cut and {lost.num_dropped} left out of {lost.num}"
        for name, lost in lengths.items()
        if lost.num_truncated or lost.num_dropped
    ]
    return f"conversations beyond max_length {max_length}: {'; '.join(parts)}" if parts else ""


def training_rows(dataset: Dataset, recipe: Recipe) -> TrainingRows:
    """What the adapter is trained and checked on."""
    heldout = _few_of_each_source(dataset.test)
    return TrainingRows(
        retain=retain_set(dataset.train, recipe),
        harmful=[c for c in dataset.train if c.label == "harmful"],
        heldout_retain=[c for c in heldout if c.label == "benign"],
        heldout_harmful=[c for c in heldout if c.label == "harmful"],
    )


def train(run: Run, dataset: Dataset) -> AdapterResult:
    """The adapter; goes on from its own checkpoints. Every process takes part."""
    model = run.model
    digest = json_digest(
        [run.recipe.training_digest(), dataset.digests, model.revision, model.config_sha256]
    )
    out = run.work.path / f"adapter-{digest[:12]}"
    rows = training_rows(dataset, run.recipe)

    results: list[AdapterResult] = []

    def work() -> dict[str, Any]:
        result = train_adapter(
            run.recipe,
            model_dir=model.path,
            revision=model.revision,
            rows=rows,
            out=out,
            processes=run.processes,
            console=run.console,
        )
        results.append(result)
        return {"steps": result.steps}

    if run.processes.is_main:
        run.work.stage("adapter", {"digest": digest}, work)
    if not results:
        # Read again rather than kept: the trainer checks that the result is that of this data.
        work()
    (result,) = results
    if run.processes.is_main:
        # After a kill, the stage's own clock has seen only the last part.
        run.work.seconds["adapter"] = max(run.work.seconds["adapter"], result.seconds)
    return result


def compare_texts(
    run: Run, dataset: Dataset, rows: Sequence[Row], adapter: AdapterResult
) -> dict[str, Any]:
    """Perplexity by stratum and some continuations, of the base and of the merged model."""
    by_conversation = {id(row.conversation): row for row in rows}
    judged = [
        by_conversation[id(c)] for c in _few_of_each_source([row.conversation for row in rows])
    ]
    strata = [text_stratum(r.conversation) for r in judged]
    shown = [
        row
        for label in ("harmful", "benign")
        for row in _evenly([r for r in rows if r.conversation.label == label], _NUM_SHOWN)
    ]
    prompts = [render_prompt(run.tokenizer, r.conversation.messages[:-1]) for r in shown]

    def compute() -> dict[str, Any]:
        measured = {}
        for name, path in (("base", run.model.path), ("merged", run.merged_dir(adapter))):
            model = LanguageModel(path)
            with progress_bar(run.console, f"text of {name}", len(judged)) as progress:
                losses = model.losses([r.rendered for r in judged], progress=progress)
            measured[name] = (
                perplexities(losses, strata),
                model.continuations(prompts, max_new_tokens=_SHOWN_TOKENS),
            )
        base, merged = measured["base"], measured["merged"]
        return {
            "perplexity": {
                name: {"base": base[0][name], "merged": merged[0][name]} for name in base[0]
            },
            "generations": [
                {
                    "label": row.conversation.label,
                    "prompt": row.conversation.messages[-2].content,
                    "base": before,
                    "merged": after,
                }
                for row, before, after in zip(shown, base[1], merged[1], strict=True)
            ],
        }

    return run.work.stage("texts", run.inputs(adapter, dataset), compute)


def text_stratum(conversation: Conversation) -> str:
    """What a text counts as, and where it is from: "refused" is neither benign nor harmful."""
    return f"{expected_verdict(conversation)}: {conversation.source}"


def _few_of_each_source(conversations: Sequence[Conversation]) -> list[Conversation]:
    chosen = []
    for source in sorted({c.source for c in conversations}):
        chosen += _evenly([c for c in conversations if c.source == source], _HELDOUT_PER_SOURCE)
    return chosen


def _evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` items, spread over the sequence."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
