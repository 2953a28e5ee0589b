"""What the adapter costs: perplexity of held-out benign answers, and public tasks.

The tasks are those of lm-evaluation-harness, which is used if the user has installed it; it is no
dependency.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from circuit_breakers.errors import ConfigError, DataError, EvaluationError
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.fluency import LanguageModel, Loss, perplexity
from circuit_breakers_training.probe.selection import expected_verdict
from circuit_breakers_training.render import TemplateSource, render_all
from circuit_breakers_training.work_dir import progress_bar

__all__ = [
    "benign_answers",
    "benign_perplexity",
    "check_lm_eval",
    "compare_losses",
    "run_lm_eval",
]


def benign_answers(dataset: Dataset | None, *, limit: int) -> list[Conversation]:
    """The test split's benign conversations, at most `limit` of each source.

    Raises:
        DataError: there is no dataset, or it has none.
    """
    benign = [c for c in dataset.test if expected_verdict(c) == "benign"] if dataset else []
    chosen = []
    for source in sorted({c.source for c in benign}):
        chosen += [c for c in benign if c.source == source][:limit]
    if not chosen:
        raise DataError(
            "suite 'capability' is empty: got no benign answers, expected those of a dataset's "
            "test split; give the dataset with --data, or leave the suite out"
        )
    return chosen


def benign_perplexity(
    models: Mapping[str, Path],
    answers: Sequence[Conversation],
    *,
    chat_template: TemplateSource,
    max_length: int,
    console: Console | None,
) -> dict[str, Any]:
    """Perplexity of benign answers, by source and over all, of each model.

    An adapter that takes a benign conversation for a harmful one breaks its answer and leaves the
    others alone, so one mean hides what users see: answers whose own perplexity more than doubles
    are counted, and the change of all others is given beside the change of all.

    Args:
        models: checkpoints by name; the first one is the base.
        chat_template: what renders the answers, for each model alike.
        max_length: tokens of a conversation that are read.
    Raises:
        EvaluationError: no answer fits, or a loss is not finite.
    """
    strata: list[str] = []
    losses_of: dict[str, list[Loss]] = {}
    for name, path in models.items():
        model = LanguageModel(path, chat_template)
        rendered = render_all(model.tokenizer, answers, max_length=max_length)
        strata = [answers[i].source for i in rendered.kept]
        if not strata:
            raise EvaluationError(
                f"got no answer that begins within {max_length} tokens, expected some; bring "
                "shorter prompts"
            )
        with progress_bar(console, f"perplexity, {name}", len(rendered.rows)) as progress:
            losses = model.losses(rendered.rows, progress=progress)
        if not all(math.isfinite(loss.nats) for loss in losses):
            raise EvaluationError(
                f"got a loss of model {name!r} that is not finite, expected "
                "numbers; check the checkpoint and its dtype"
            )
        losses_of[name] = losses
    indices = {s: [i for i, of in enumerate(strata) if of == s] for s in sorted(set(strata))}
    indices["all"] = list(range(len(strata)))
    return {
        "num_conversations": {stratum: len(chosen) for stratum, chosen in indices.items()},
        "perplexity": {
            stratum: compare_losses({n: [of[i] for i in chosen] for n, of in losses_of.items()})
            for stratum, chosen in indices.items()
        },
    }


def compare_losses(losses_of: Mapping[str, Sequence[Loss]]) -> dict[str, float | None]:
    """Perplexities of the same answers by each model, and how those after the first differ.

    Args:
        losses_of: losses by model, in the same order of answers; the first model is the base.
    Returns:
        for each model its perplexity, and for each other one `_change` against the base's,
        `_doubled`, the answers whose own perplexity more than doubles, and `_change_of_rest`,
        which is None where no other answers are left.
    """
    (_, base_losses), *others = losses_of.items()
    found: dict[str, float | None] = {name: perplexity(of) for name, of in losses_of.items()}
    for name, losses in others:
        rest = [
            pair
            for pair in zip(losses, base_losses, strict=True)
            if perplexity(pair[:1]) <= 2 * perplexity(pair[1:])
        ]
        found[f"{name}_change"] = perplexity(losses) / perplexity(base_losses) - 1
        found[f"{name}_doubled"] = len(losses) - len(rest)
        found[f"{name}_change_of_rest"] = None
        if rest:
            ours, bases = zip(*rest, strict=True)
            found[f"{name}_change_of_rest"] = perplexity(ours) / perplexity(bases) - 1
    return found


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Pass if the suite "lm-eval" can run.

    Raises:
        ConfigError: no tasks are named, or the package is not installed.
    """
    if not tasks:
        raise ConfigError(
            "suite 'lm-eval': got no tasks, expected some; name them with --lm-eval-task, e.g. "
            "--lm-eval-task arc_easy"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "suite 'lm-eval': got no package lm_eval, expected it installed; pip install lm-eval, "
            "or leave the suite out"
        )


def run_lm_eval(
    models: Mapping[str, Path], tasks: Sequence[str], *, limit: int | None, seed: int
) -> dict[str, Any]:
    """Results of lm-evaluation-harness on each task: {task: {model: {metric: value}}}.

    Raises:
        EvaluationError: the harness fails, or leaves out a task.
    """
    harness = importlib.import_module("lm_eval")
    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for name, path in models.items():
        try:
            found = harness.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(path), "trust_remote_code": False},
                tasks=list(tasks),
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        except Exception as e:
            # Whatever the harness raises ends the suite by name; nothing is passed over.
            raise EvaluationError(
                f"the harness failed on model {name!r} ({type(e).__name__}: {e}), "
                f"expected results for {', '.join(tasks)}; check the task names and their data"
            ) from e
        for task in tasks:
            if task not in ((found or {}).get("results") or {}):
                raise EvaluationError(
                    f"got no result of task {task!r} for model {name!r}, expected "
                    "one for each task; check the task's name"
                )
            numbers = found["results"][task]
            results[task][name] = {
                key: value
                for key, value in numbers.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            }
    return results
