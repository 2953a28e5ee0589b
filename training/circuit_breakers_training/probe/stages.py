"""The stages of a training run that make the probe: choose it, score with it, set its thresholds.

N conversations, T tokens of one of them, P candidates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from circuit_breakers.artifact import Aggregation, ProbeSpec, ProbeWeights
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.adapter.trainer import AdapterResult
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.probe.calibration import calibrate, peak_histogram
from circuit_breakers_training.probe.evaluate import ScoredConversation
from circuit_breakers_training.probe.fit import token_logits
from circuit_breakers_training.probe.fit_plan import FitPlan, plan_fit
from circuit_breakers_training.probe.fit_tokens import collect_fit_tokens
from circuit_breakers_training.probe.long_context import evaluate_long, long_conversations
from circuit_breakers_training.probe.selection import (
    Candidate,
    best_candidate,
    candidate_layers,
    candidate_quality,
    expected_verdict,
    fit_candidates,
)
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.stages import Row, Run
from circuit_breakers_training.work_dir import progress_bar

__all__ = [
    "ChosenProbe",
    "calibrate_probe",
    "choose_probe",
    "measure_long",
    "planned_fit",
    "score_splits",
]


class ChosenProbe(NamedTuple):
    candidate: Candidate
    table: list[dict[str, Any]]
    """Quality of every candidate on the selection split."""
    selection: list[ScoredConversation]
    """The selection split under the chosen candidate."""


def planned_fit(run: Run, train: Sequence[Row]) -> FitPlan:
    """What of the train split the probe is fitted on.

    Raises:
        ConfigError: the recipe leaves no memory for one token of each conversation.
    """
    return plan_fit(
        [row.conversation for row in train],
        [row.rendered for row in train],
        run.recipe.probe,
        num_layers=run.model.num_layers,
        hidden_size=run.model.hidden_size,
    )


def choose_probe(
    run: Run,
    dataset: Dataset,
    splits: Mapping[str, Sequence[Row]],
    adapter: AdapterResult,
    fit: FitPlan,
) -> ChosenProbe:
    """All candidates fitted on the train split as planned, the best one on the selection split."""
    recipe = run.recipe.probe
    selection = splits["selection"]

    def compute() -> dict[str, Any]:
        reader = ResidualReader(run.merged_dir(adapter), run.candidate_layers())
        candidates = _fitted(run, reader, [splits["train"][i] for i in fit.kept], fit)
        with progress_bar(run.console, "reading selection", len(selection)) as progress:
            logits = token_logits(
                reader,
                [r.rendered for r in selection],
                [(c.layers, c.weights) for c in candidates],
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
            "layers": candidates[best].layers,
            "aggregation": candidates[best].aggregation.model_dump(mode="json"),
            "weight": candidates[best].weights.weight_D.tolist(),
            "bias": candidates[best].weights.bias,
            "table": [
                {
                    "layers": c.layers,
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
        Candidate(tuple(kept["layers"]), aggregation, weights),
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
        reader = ResidualReader(run.merged_dir(adapter), probe.layers)
        result = {}
        for name, split in rows.items():
            with progress_bar(run.console, f"reading {name}", len(split)) as progress:
                logits = token_logits(
                    reader,
                    [r.rendered for r in split],
                    [(probe.layers, probe.weights)],
                    progress=progress,
                )
            result[name] = [logit_TP[:, 0].tolist() for logit_TP in logits]
        return result

    kept = run.work.stage("scores", run.inputs(adapter, dataset, **_identity(probe)), compute)
    return {name: _scored(split, kept[name]) for name, split in rows.items()}


def calibrate_probe(
    recipe: Recipe, probe: Candidate, benign: Sequence[ScoredConversation]
) -> ProbeSpec:
    """The probe with its threshold, and those of the other promises that the data supports.

    Its calibration also says how the conversations scored by phase, by what a server observes of a
    stream: the highest running score, which the prompt's tokens enter, at the phase's tokens.

    Raises:
        CalibrationError: too few conversations for the promised false-positive rate.
    """
    prompt_N, completion_N = np.array(
        [_phase_peaks(row, probe.aggregation) for row in benign], np.float32
    ).T
    threshold, calibration = calibrate(
        np.maximum(prompt_N, completion_N),
        target_fpr=recipe.probe.target_fpr,
        confidence=recipe.probe.confidence,
        max_tokens=max(len(row.logit_T) for row in benign),
        ladder=recipe.probe.fpr_ladder,
    )
    layers = probe.layers
    alone = len(layers) == 1
    return ProbeSpec(
        name=f"layer{layers[0]}" if alone else f"layers{'-'.join(map(str, layers))}",
        layer=layers[0] if alone else None,
        layers=None if alone else layers,
        aggregation=probe.aggregation,
        threshold_logit=threshold,
        calibration=calibration.model_copy(
            update={
                "histogram": {
                    "prompt": peak_histogram(prompt_N),
                    "completion": peak_histogram(completion_N),
                }
            }
        ),
    )


def _phase_peaks(row: ScoredConversation, aggregation: Aggregation) -> tuple[float, float]:
    """Highest running score at the prompt's tokens, and at the response's."""
    prompt_T, response_T = np.split(aggregate(row.logit_T, aggregation), [row.num_prompt_tokens])
    return float(np.max(prompt_T)), float(np.max(response_T, initial=-np.inf))


def measure_long(
    run: Run,
    dataset: Dataset,
    test: Sequence[ScoredConversation],
    adapter: AdapterResult,
    probe: Candidate,
    spec: ProbeSpec,
) -> dict[str, Any]:
    """What the breaker does in conversations of thousands of tokens, put together from `test`."""
    count = run.recipe.probe.long_conversations
    # Batches are padded to a multiple of 16 tokens, and absolute positions end at the context.
    context = run.model.max_position_embeddings // 16 * 16
    conversations = long_conversations(
        run.tokenizer,
        [row.conversation for row in test],
        count=count,
        context=context,
        seed=run.recipe.seed,
    )

    def compute() -> dict[str, Any]:
        reader = ResidualReader(run.merged_dir(adapter), probe.layers)
        with progress_bar(run.console, "reading long ones", len(conversations)) as progress:
            logits = token_logits(
                reader,
                [c.rendered for c in conversations],
                [(probe.layers, probe.weights)],
                progress=progress,
            )
        return {"logits": [logit_TP[:, 0].tolist() for logit_TP in logits]}

    inputs = run.inputs(adapter, dataset, count=count, context=context, **_identity(probe))
    kept = run.work.stage("long", inputs, compute)
    logits = [np.array(logit_T, np.float32) for logit_T in kept["logits"]]
    return evaluate_long(conversations, logits, test, spec)


def _fitted(run: Run, reader: ResidualReader, rows: Sequence[Row], fit: FitPlan) -> list[Candidate]:
    recipe = run.recipe.probe
    layer_sets = candidate_layers(reader.layers, recipe.concatenations)
    # Not in the system's place for temporary files, which may be memory.
    with TemporaryDirectory(dir=run.work.path, prefix="fit-tokens-") as directory:
        with progress_bar(run.console, "reading train", len(rows)) as progress:
            tokens = collect_fit_tokens(
                reader,
                [r.rendered for r in rows],
                [r.conversation.label == "harmful" for r in rows],
                directory=Path(directory),
                aggregations=recipe.aggregations,
                tokens_per_conversation=fit.tokens_per_conversation,
                seed=run.recipe.seed,
                progress=progress,
            )
        total = len(layer_sets) * len(recipe.aggregations)
        candidates = []
        with progress_bar(run.console, "fitting probes", total) as progress:
            for candidate in fit_candidates(tokens, layer_sets, inverse_l2=recipe.l2_C):
                candidates.append(candidate)
                progress(1)
    return candidates


def _identity(probe: Candidate) -> dict[str, Any]:
    return {
        "layers": probe.layers,
        "weight": probe.weights.weight_D.tolist(),
        "bias": probe.weights.bias,
    }


def _scored(rows: Sequence[Row], logits: Sequence[Sequence[float]]) -> list[ScoredConversation]:
    return [
        ScoredConversation(
            row.conversation, row.rendered.num_prompt_tokens, np.array(logit_T, np.float32)
        )
        for row, logit_T in zip(rows, logits, strict=True)
    ]
