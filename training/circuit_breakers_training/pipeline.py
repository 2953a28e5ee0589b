"""From a recipe to a breaker on disk.

    data ─ adapter ─ probe ─ scores ─ calibration ─┐
              ├───── texts ────────── evaluation ──┼─ report ─ breaker
              └───── long conversations ───────────┘

The results of stages are kept in `<out>.work`: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from circuit_breakers.artifact import Breaker, save_breaker
from circuit_breakers.artifact.store import CHAT_TEMPLATE
from circuit_breakers.errors import ConfigError
from circuit_breakers.models import resolve_model
from circuit_breakers_training.calibration import num_trips_allowed
from circuit_breakers_training.config import Recipe
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.environment import describe_environment, machine_text
from circuit_breakers_training.evaluate import evaluate_probe, roc_points
from circuit_breakers_training.evaluation.held_out import DIGESTS_FILE, digests_file
from circuit_breakers_training.export import pick_canaries, provable
from circuit_breakers_training.long_context import extrapolated_rates
from circuit_breakers_training.probe_stages import (
    calibrate_probe,
    choose_probe,
    measure_long,
    score_splits,
)
from circuit_breakers_training.render import PLAIN_TEMPLATE, load_tokenizer
from circuit_breakers_training.report import log_columns, report_files
from circuit_breakers_training.run_log import peak_rss_mib, read_metrics
from circuit_breakers_training.selection import expected_verdict
from circuit_breakers_training.stages import (
    Row,
    Run,
    build_data,
    compare_texts,
    render_splits,
    train,
)
from circuit_breakers_training.trainer import AdapterResult
from circuit_breakers_training.work_dir import WorkDir

__all__ = ["breaker_name", "run_training"]

METRICS_VERSION = 2


def run_training(
    recipe: Recipe,
    out: Path,
    *,
    name: str | None = None,
    data_dir: Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    console: Console | None = None,
) -> Breaker:
    """Train, calibrate and evaluate the breaker of `recipe`, and save it as directory `out`.

    Args:
        name: of the breaker; that of the model unless given.
        data_dir: a built dataset; built for the model unless given.
        resume: go on with what `<out>.work` holds of an earlier run with the same settings.
        overwrite: replace a breaker at `out`.
        console: where progress bars go; none means no progress bars.
    Raises:
        ModelError: the model cannot be found or read.
        DataError: the data cannot be read, or a split lacks a label.
        CalibrationError: too few benign conversations for the promised false-positive rate, or no
            harmful one trips.
        ConfigError: the recipe does not fit the model, or `out` is taken.
    """
    # What can be refused is refused before minutes are spent.
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists, expected a new directory; choose another or overwrite it")
    model = resolve_model(recipe.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe.check_runs(
        num_layers=model.num_layers, max_positions=model.max_position_embeddings, device=device
    )
    transformers_logging.disable_progress_bar()
    run = Run(
        recipe=recipe,
        model=model,
        work=WorkDir(out.with_name(f"{out.name}.work"), resume=resume),
        console=console,
        tokenizer=load_tokenizer(model.path, recipe.chat_template),
        device=device,
    )
    dataset = build_data(run) if data_dir is None else load_dataset(data_dir)
    splits = render_splits(run, dataset)
    num_benign = sum(expected_verdict(r.conversation) == "benign" for r in splits["calibration"])
    num_trips_allowed(num_benign, recipe.probe.target_fpr, recipe.probe.confidence)

    adapter = train(run, dataset)
    probe = choose_probe(run, dataset, splits, adapter)
    scored = score_splits(run, dataset, splits, adapter, probe.candidate)
    spec = calibrate_probe(recipe, probe.candidate, scored["calibration"])
    spec = provable(spec, probe.selection)
    texts = compare_texts(run, dataset, splits["test"], adapter)
    created = datetime.now(UTC).replace(microsecond=0)
    roc = roc_points(scored["test"], spec)
    metrics = {
        "schema_version": METRICS_VERSION,
        "name": name or breaker_name(model.name),
        "created": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "model": model.spec().model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "data_sha256": dataset.digests,
        "data_built": data_dir is None,
        "data_counts": {split: _counts(rows) for split, rows in splits.items()},
        "adapter": _adapter_metrics(adapter),
        "adapter_sha256": sha256(_weights(adapter).read_bytes()).hexdigest(),
        "training_log": log_columns(read_metrics(adapter.metrics_path)),
        "probe": {**spec.model_dump(mode="json"), "layers": spec.read_layers},
        "selection": probe.table,
        "test": evaluate_probe(scored["test"], spec),
        "roc": {
            "false_positive_rate": roc[0].tolist(),
            "true_positive_rate": roc[1].tolist(),
        },
        "beyond_calibrated_length": extrapolated_rates(scored["test"], spec),
        "long_context": measure_long(run, dataset, scored["test"], adapter, probe.candidate, spec),
        **texts,
        "seconds": {**run.work.seconds, "total": sum(run.work.seconds.values())},
        "peak_rss_mib": max(peak_rss_mib(), adapter.peak_rss_mib),
        "peak_rss_mib_by_stage": run.work.peak_rss_mib,
        "machine": machine_text(),
        "environment": describe_environment(),
    }
    breaker = save_breaker(
        out,
        name=metrics["name"],
        base_model=model.spec(),
        recipe=metrics["recipe"],
        data_sha256=dataset.digests,
        probes=[spec],
        weights={spec.name: probe.candidate.weights},
        adapter_dir=adapter.adapter_dir,
        canaries=pick_canaries(probe.selection, spec),
        extra_files={
            **report_files(metrics),
            **_own_template(recipe),
            DIGESTS_FILE: digests_file(dataset),
        },
        created=created,
        overwrite=overwrite,
    )
    # As large as the base model, and quickly made again.
    shutil.rmtree(run.work.path / "merged", ignore_errors=True)
    return breaker


def breaker_name(model_name: str) -> str:
    """The model's name as a label: lower case, and only characters that a metric label may have."""
    label = re.sub(r"[^a-z0-9._-]+", "-", model_name.lower())
    return label.strip("-._")[:64] or "breaker"


def _adapter_metrics(adapter: AdapterResult) -> dict[str, Any]:
    fields = asdict(adapter)
    # Paths of this machine mean nothing elsewhere.
    return {name: value for name, value in fields.items() if not isinstance(value, Path)}


def _weights(adapter: AdapterResult) -> Path:
    return adapter.adapter_dir / "adapter_model.safetensors"


def _counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Conversations by what a guard should say about them, and by source."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        sources = counts.setdefault(expected_verdict(row.conversation), {})
        sources[row.conversation.source] = sources.get(row.conversation.source, 0) + 1
    return {verdict: dict(sorted(sources.items())) for verdict, sources in sorted(counts.items())}


def _own_template(recipe: Recipe) -> dict[str, bytes]:
    """The chat template that the server has to use, where it is not the model's."""
    if recipe.chat_template == "model":
        return {}
    return {CHAT_TEMPLATE: PLAIN_TEMPLATE.encode()}
