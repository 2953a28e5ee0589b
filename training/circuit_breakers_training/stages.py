"""The stages of a training run; pipeline.py says how they follow on each other.

Each takes what earlier ones made and returns plain values, kept in the run's working directory.

N conversations, T tokens of one of them, P candidates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console

from circuit_breakers.artifact import Aggregation, ProbeSpec, ProbeWeights
from circuit_breakers.engine.merge import merge_adapter, merge_key
from circuit_breakers.models import ResolvedModel
from circuit_breakers_training.activations import ResidualReader
from circuit_breakers_training.calibration import calibrate, peak_score
from circuit_breakers_training.config import Recipe, layer_at_depth
from circuit_breakers_training.data.build import build_dataset
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.evaluate import ScoredConversation
from circuit_breakers_training.fluency import LanguageModel, perplexities
from circuit_breakers_training.probe_fit import collect_fit_tokens, token_logits
from circuit_breakers_training.render import Rendered, render_all, render_prompt
from circuit_breakers_training.selection import (
    Candidate,
    best_candidate,
    candidate_quality,
    expected_verdict,
    fit_candidates,
)
from circuit_breakers_training.trainer import AdapterResult, TrainingRows, train_adapter
from circuit_breakers_training.work_dir import WorkDir, json_digest, progress_bar

__all__ = [
    "ChosenProbe",
    "Row",
    "Run",
    "build_data",
    "calibrate_probe",
    "choose_probe",
    "compare_texts",
    "render_splits",
    "score_splits",
    "train",
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


class ChosenProbe(NamedTuple):
    candidate: Candidate
    table: list[dict[str, Any]]
    """Quality of every candidate on the selection split."""
    selection: list[ScoredConversation]
    """The selection split under the chosen candidate."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage needs."""

    recipe: Recipe
    model: ResolvedModel
    work: WorkDir
    console: Console | None
    tokenizer: Any
    device: str

    def candidate_layers(self) -> list[int]:
        """0-based blocks that the probe may read, ascending."""
        depths = self.recipe.probe.candidate_depths
        return sorted({layer_at_depth(depth, self.model.num_layers) for depth in depths})

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

    def build() -> dict[str, Any]:
        built = build_dataset(
            own,
            model=run.recipe.model,
            seed=settings.seed,
            max_new_tokens=settings.max_new_tokens,
            overwrite=True,
        )
        return {"digest": built.summary["digest"]}

    inputs = {"recipe": settings.model_dump(mode="json"), "model": run.recipe.model}
    run.work.stage("data", inputs, build)
    return load_dataset(own)


def render_splits(run: Run, dataset: Dataset) -> dict[str, list[Row]]:
    """Every conversation with a response token within max_length, by split."""
    splits: dict[str, list[Row]] = {}
    for name in ("train", "selection", "calibration", "test"):
        conversations: Sequence[Conversation] = getattr(dataset, name)
        rendered = render_all(run.tokenizer, conversations, max_length=run.recipe.max_length)
        splits[name] = [
            Row(conversations[index], row)
            for index, row in zip(rendered.kept, rendered.rows, strict=True)
        ]
    return splits


def train(run: Run, dataset: Dataset) -> AdapterResult:
    """The adapter; goes on from its own checkpoints."""
    digest = json_digest([run.recipe.training_digest(), dataset.digests])
    out = run.work.path / f"adapter-{digest[:12]}"
    heldout = _few_of_each_source(dataset.test)
    rows = TrainingRows(
        retain=[c for c in dataset.train if c.label == "benign"],
        harmful=[c for c in dataset.train if c.label == "harmful"],
        heldout_retain=[c for c in heldout if c.label == "benign"],
        heldout_harmful=[c for c in heldout if c.label == "harmful"],
    )

    def work() -> AdapterResult:
        return train_adapter(
            run.recipe,
            model_dir=run.model.path,
            rows=rows,
            out=out,
            device=run.device,
            console=run.console,
        )

    run.work.stage("adapter", {"digest": digest}, lambda: {"steps": work().steps})
    # Read again rather than kept: the trainer checks that the result is that of this data.
    result = work()
    # After a kill, the stage's own clock has seen only the last part.
    run.work.seconds["adapter"] = max(run.work.seconds["adapter"], result.seconds)
    return result


def choose_probe(
    run: Run, dataset: Dataset, splits: Mapping[str, Sequence[Row]], adapter: AdapterResult
) -> ChosenProbe:
    """All candidates fitted on the train split, the best one on the selection split."""
    recipe = run.recipe.probe
    layers = run.candidate_layers()
    train_rows = [r for r in splits["train"] if expected_verdict(r.conversation) != "refused"]
    selection = splits["selection"]

    def compute() -> dict[str, Any]:
        reader = ResidualReader(run.merged_dir(adapter), layers)
        with progress_bar(run.console, "reading train", len(train_rows)) as progress:
            tokens = collect_fit_tokens(
                reader,
                [r.rendered for r in train_rows],
                [r.conversation.label == "harmful" for r in train_rows],
                aggregations=recipe.aggregations,
                tokens_per_conversation=recipe.tokens_per_conversation,
                seed=run.recipe.seed,
                progress=progress,
            )
        candidates = fit_candidates(tokens, layers, recipe.aggregations, inverse_l2=recipe.l2_C)
        with progress_bar(run.console, "reading selection", len(selection)) as progress:
            logits = token_logits(
                reader,
                [r.rendered for r in selection],
                [(c.layer, c.weights) for c in candidates],
                progress=progress,
            )
        counted = [expected_verdict(r.conversation) != "refused" for r in selection]
        qualities = candidate_quality(
            candidates,
            [x for x, keep in zip(logits, counted, strict=True) if keep],
            [
                r.conversation.label == "harmful"
                for r, keep in zip(selection, counted, strict=True)
                if keep
            ],
        )
        best = best_candidate(qualities)
        return {
            "layer": candidates[best].layer,
            "aggregation": candidates[best].aggregation.model_dump(mode="json"),
            "weight": candidates[best].weights.weight_D.tolist(),
            "bias": candidates[best].weights.bias,
            "table": [
                {
                    "layer": c.layer,
                    "aggregation": c.aggregation.model_dump(mode="json"),
                    **q._asdict(),
                    "chosen": p == best,
                }
                for p, (c, q) in enumerate(zip(candidates, qualities, strict=True))
            ],
            "selection_logits": [logit_TP[:, best].tolist() for logit_TP in logits],
        }

    inputs = run.inputs(
        adapter, dataset, recipe=recipe.model_dump(mode="json"), seed=run.recipe.seed
    )
    kept = run.work.stage("probe", inputs, compute)
    weights = ProbeWeights(np.array(kept["weight"], np.float32), kept["bias"])
    aggregation = Aggregation.model_validate(kept["aggregation"])
    return ChosenProbe(
        Candidate(kept["layer"], aggregation, weights),
        kept["table"],
        _scored(selection, kept["selection_logits"]),
    )


def score_splits(
    run: Run,
    dataset: Dataset,
    splits: Mapping[str, Sequence[Row]],
    adapter: AdapterResult,
    probe: Candidate,
) -> dict[str, list[ScoredConversation]]:
    """The calibration and test splits under the chosen probe."""
    # The threshold depends on benign conversations alone.
    rows = {
        "calibration": [
            r for r in splits["calibration"] if expected_verdict(r.conversation) == "benign"
        ],
        "test": list(splits["test"]),
    }

    def compute() -> dict[str, Any]:
        reader = ResidualReader(run.merged_dir(adapter), [probe.layer])
        result = {}
        for name, split in rows.items():
            with progress_bar(run.console, f"reading {name}", len(split)) as progress:
                logits = token_logits(
                    reader,
                    [r.rendered for r in split],
                    [(probe.layer, probe.weights)],
                    progress=progress,
                )
            result[name] = [logit_TP[:, 0].tolist() for logit_TP in logits]
        return result

    inputs = run.inputs(
        adapter,
        dataset,
        layer=probe.layer,
        weight=probe.weights.weight_D.tolist(),
        bias=probe.weights.bias,
    )
    kept = run.work.stage("scores", inputs, compute)
    return {name: _scored(split, kept[name]) for name, split in rows.items()}


def calibrate_probe(
    recipe: Recipe, probe: Candidate, benign: Sequence[ScoredConversation]
) -> ProbeSpec:
    """The probe with its threshold.

    Raises:
        CalibrationError: too few conversations for the promised false-positive rate.
    """
    threshold, calibration = calibrate(
        np.array([peak_score(row.logit_T, probe.aggregation) for row in benign], np.float32),
        target_fpr=recipe.probe.target_fpr,
        confidence=recipe.probe.confidence,
        max_tokens=max(len(row.logit_T) for row in benign),
    )
    return ProbeSpec(
        name=f"layer{probe.layer}",
        layer=probe.layer,
        aggregation=probe.aggregation,
        threshold_logit=threshold,
        calibration=calibration,
    )


def compare_texts(
    run: Run, dataset: Dataset, rows: Sequence[Row], adapter: AdapterResult
) -> dict[str, Any]:
    """Perplexity by stratum and some continuations, of the base and of the merged model."""
    by_conversation = {id(row.conversation): row for row in rows}
    judged = [
        by_conversation[id(c)] for c in _few_of_each_source([row.conversation for row in rows])
    ]
    strata = [f"{r.conversation.label}: {r.conversation.source}" for r in judged]
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


def _scored(rows: Sequence[Row], logits: Sequence[Sequence[float]]) -> list[ScoredConversation]:
    return [
        ScoredConversation(
            row.conversation, row.rendered.num_prompt_tokens, np.array(logit_T, np.float32)
        )
        for row, logit_T in zip(rows, logits, strict=True)
    ]


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
