"""Train the adapter of a breaker by Representation Rerouting.

    conversations ─ render ─ plan of steps ─ two streams ─ two losses ─ AdamW ─ adapter
                                              every few steps ─ checkpoint

The method is that of arXiv 2406.04313: the losses are in objective.py, the two streams in
streams.py. A run ends with the cosine on held-out conversations (heldout.py), which is what counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.batch_losses import batch_losses
from circuit_breakers_training.batches import plan_steps
from circuit_breakers_training.blank_prompts import blank_prompts
from circuit_breakers_training.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from circuit_breakers_training.config import Recipe
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.heldout import HeldoutCosine, heldout_cosine
from circuit_breakers_training.objective import coefficients
from circuit_breakers_training.render import Rendered, RenderedSet, load_tokenizer, render_all
from circuit_breakers_training.run_log import RunLog, peak_rss_mib, read_metrics
from circuit_breakers_training.streams import Streams

__all__ = ["AdapterResult", "TrainingRows", "train_adapter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Conversations by their part in the training."""

    retain: Sequence[Conversation]
    """Benign: representations stay as they are."""
    harmful: Sequence[Conversation]
    """Representations are rerouted."""
    heldout_retain: Sequence[Conversation] = ()
    """Benign, never trained on: their cosine shows what the adapter costs."""
    heldout_harmful: Sequence[Conversation] = ()
    """Harmful, never trained on: their cosine shows what the adapter does."""


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """A trained adapter and how it does on conversations that it was not trained on."""

    adapter_dir: Path
    """Plain PEFT: adapter_config.json and adapter_model.safetensors."""
    metrics_path: Path
    """JSON lines, one a step."""
    target_layers: tuple[int, ...]
    steps: int
    seconds: float
    """Time of all steps, resumed parts included, without loading and the held-out check."""
    peak_rss_mib: float
    """Largest resident memory of the process that finished the run."""
    num_truncated: int
    """Training conversations cut at max_length."""
    num_dropped: int
    """Training conversations left out, as no response token fitted."""
    num_blanked: int
    """Harmful training conversations whose last user turn was blanked."""
    benign_cosine: float | None
    """Cosine of adapted and base at the targets, held-out benign responses; None without any."""
    harmful_cosine: float | None
    """The same for held-out harmful responses."""
    benign_cosine_by_source: Mapping[str, float]
    harmful_cosine_by_source: Mapping[str, float]


def train_adapter(
    recipe: Recipe,
    *,
    model_dir: Path,
    rows: TrainingRows,
    out: Path,
    device: str = "cpu",
    console: Console | None = None,
) -> AdapterResult:
    """Train the adapter of `recipe` and write it to `out`/adapter.

    A killed run goes on from its last checkpoint when called again with the same arguments; a
    complete one returns its result.

    Args:
        model_dir: local directory of the base model; the adapter names `recipe.model` as its base.
        out: directory of this run alone.
        console: where a progress bar goes; none means no progress bar.
    Raises:
        ConfigError: `out` belongs to a run with other settings or data, the recipe does not fit
            the model, or the loss is no longer finite.
        DataError: a kind of conversation is missing or cannot be rendered.
        ModelError: the model cannot be loaded or has no chat template.
    """
    tokenizer = load_tokenizer(model_dir, recipe.chat_template)
    retain = _render("benign", rows.retain, tokenizer, recipe)
    blanked = blank_prompts(
        rows.harmful, share=recipe.data.blank_prompt_share, seed=recipe.seed, tokenizer=tokenizer
    )
    harmful = _render("harmful", blanked.conversations, tokenizer, recipe)
    digest = _run_digest(recipe, retain.rows, harmful.rows)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "result.json").exists():
        return _read_result(out, digest)
    streams = Streams(recipe, model_dir, torch.device(device))
    _run_steps(recipe, streams, retain.rows, harmful.rows, out, digest, console)
    streams.save_adapter(out / "adapter", base_name=recipe.model)
    benign = _heldout(rows.heldout_retain, tokenizer, recipe, streams)
    rerouted = _heldout(rows.heldout_harmful, tokenizer, recipe, streams)
    entries = read_metrics(out / "metrics.jsonl")
    result = AdapterResult(
        adapter_dir=out / "adapter",
        metrics_path=out / "metrics.jsonl",
        target_layers=streams.targets,
        steps=recipe.steps,
        seconds=sum(entry["seconds"] for entry in entries),
        peak_rss_mib=peak_rss_mib(),
        num_truncated=retain.num_truncated + harmful.num_truncated,
        num_dropped=retain.num_dropped + harmful.num_dropped,
        num_blanked=blanked.num_blanked,
        benign_cosine=benign.overall,
        harmful_cosine=rerouted.overall,
        benign_cosine_by_source=benign.by_source,
        harmful_cosine_by_source=rerouted.by_source,
    )
    _write_result(out, result, digest)
    # The result now stands for the run; a checkpoint is several times the adapter's size.
    (out / "checkpoint.safetensors").unlink()
    logger.info(
        "adapter trained: steps=%d seconds=%.1f num_blanked=%d benign_cosine=%s harmful_cosine=%s",
        result.steps,
        result.seconds,
        result.num_blanked,
        result.benign_cosine,
        result.harmful_cosine,
    )
    return result


def _run_steps(
    recipe: Recipe,
    streams: Streams,
    retain: Sequence[Rendered],
    harmful: Sequence[Rendered],
    out: Path,
    digest: str,
    console: Console | None,
) -> None:
    """Do the steps that no checkpoint has done, and leave a checkpoint of the last one."""
    plan = plan_steps(
        [len(row.ids) for row in retain],
        [len(row.ids) for row in harmful],
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    parameters = streams.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    checkpoint_path = out / "checkpoint.safetensors"
    checkpoint = load_checkpoint(checkpoint_path, run_digest=digest)
    done = 0
    if checkpoint is not None:
        checkpoint.restore(parameters, optimizer)
        done = checkpoint.step
        logger.info("resuming: step=%d of %d", done, recipe.steps)
    streams.set_dropout(True)
    log = RunLog(out / "metrics.jsonl", steps=recipe.steps, done=done, console=console)
    with log:
        for step in range(done, recipe.steps):
            rows = plan[step]
            entry = _step(
                recipe,
                streams,
                optimizer,
                [retain[i] for i in rows.retain],
                [harmful[i] for i in rows.harmful],
                step,
            )
            log.step(entry)
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                save_checkpoint(
                    checkpoint_path,
                    run_digest=digest,
                    step=step + 1,
                    parameters=parameters,
                    optimizer=optimizer,
                )


def _step(
    recipe: Recipe,
    streams: Streams,
    optimizer: torch.optim.AdamW,
    retain: Sequence[Rendered],
    harmful: Sequence[Rendered],
    step: int,
) -> dict[str, Any]:
    """One optimiser step on one batch of both kinds; returns its metrics."""
    started = time.perf_counter()
    losses = batch_losses(recipe, streams, retain, harmful, step)
    if not math.isfinite(losses.loss.item()):
        raise ConfigError(
            f"the loss is {losses.loss.item()} at step {step + 1}, expected a finite number; lower "
            f"learning_rate (now {recipe.learning_rate}) or use precision fp32, and train into "
            "another output directory"
        )
    learning_rate = recipe.learning_rate * _decay(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    losses.loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], recipe.max_grad_norm
    )
    optimizer.step()
    scale = coefficients(step, recipe.steps, recipe.objective.alpha)
    num_tokens = sum(len(row.ids) for row in (*retain, *harmful))
    return {
        "step": step + 1,
        "loss": losses.loss.item(),
        "retain_loss": losses.retain_loss.item(),
        "reroute_loss": losses.reroute_loss.item(),
        "retain_cosine": losses.retain_cosine.item(),
        "reroute_cosine": losses.reroute_cosine.item(),
        "retain_coefficient": scale.retain,
        "reroute_coefficient": scale.reroute,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm.item(),
        "num_tokens": num_tokens,
        "padding_share": 1 - num_tokens / losses.padded_tokens,
        "seconds": time.perf_counter() - started,
        "peak_rss_mib": peak_rss_mib(),
    }


def _decay(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate at `step`."""
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _render(
    label: str, conversations: Sequence[Conversation], tokenizer: Any, recipe: Recipe
) -> RenderedSet:
    rendered = render_all(tokenizer, conversations, max_length=recipe.max_length)
    if not rendered.rows:
        raise DataError(
            f"got {len(conversations)} {label} conversations, of which none has a response within "
            f"max_length {recipe.max_length}; expected at least one; add {label} conversations or "
            "raise max_length"
        )
    return rendered


def _heldout(
    conversations: Sequence[Conversation], tokenizer: Any, recipe: Recipe, streams: Streams
) -> HeldoutCosine:
    rendered = render_all(tokenizer, conversations, max_length=recipe.max_length)
    sources = [conversations[i].source for i in rendered.kept]
    return heldout_cosine(streams, rendered.rows, sources, batch_size=2 * recipe.batch_size)


def _run_digest(recipe: Recipe, retain: Sequence[Rendered], harmful: Sequence[Rendered]) -> str:
    """sha256 of all that decides the adapter: settings, and the very tokens trained on."""
    digest = hashlib.sha256(recipe.training_digest().encode())
    for label, rows in (("retain", retain), ("harmful", harmful)):
        for row in rows:
            digest.update(f"{label} {row.num_prompt_tokens} {row.ids}\n".encode())
    return digest.hexdigest()


def _write_result(out: Path, result: AdapterResult, digest: str) -> None:
    fields = {**asdict(result), "run_digest": digest}
    for name in ("adapter_dir", "metrics_path"):
        fields[name] = fields[name].name
    text = json.dumps(fields, indent=2) + "\n"
    write_atomically(out / "result.json", text.encode())


def _read_result(out: Path, digest: str) -> AdapterResult:
    fields = json.loads((out / "result.json").read_text(encoding="utf-8"))
    if fields.pop("run_digest", None) != digest:
        raise ConfigError(
            f"{str(out)!r} holds an adapter trained with other settings or data; expected an empty "
            "directory or the run to go on with; choose another output directory or delete it"
        )
    for name in ("adapter_dir", "metrics_path"):
        fields[name] = out / fields[name]
    fields["target_layers"] = tuple(fields["target_layers"])
    return AdapterResult(**fields)
