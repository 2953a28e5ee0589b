"""Train the adapter of a breaker by Representation Rerouting.

    conversations ─ render ─ plan of steps ─ two streams ─ two losses ─ AdamW ─ adapter
                                              every few steps ─ checkpoint

The method is that of arXiv 2406.04313: the losses are in objective.py, the two streams in
streams.py, one step in optimizer_step.py, the processes that share it in processes.py. A run ends
with the cosine on held-out conversations (heldout.py), which is what counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from circuit_breakers.artifact.files import publish, write_atomically
from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.adapter.blank_prompts import blank_prompts
from circuit_breakers_training.adapter.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)
from circuit_breakers_training.adapter.heldout import HeldoutCosine, heldout_cosine
from circuit_breakers_training.adapter.optimizer_step import not_finite, take_step
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.batches import plan_steps
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.render import Rendered, RenderedSet, load_tokenizer, render_all
from circuit_breakers_training.run_log import RunLog, peak_rss_mib, read_metrics

__all__ = ["AdapterResult", "PinnedError", "TrainingRows", "train_adapter"]

logger = logging.getLogger(__name__)

_PINNED_STEPS = 10
_PINNED_COSINE = 0.999
"""Lowest cosine of that many steps in a row above which an adapter counts as doing nothing."""


class PinnedError(ConfigError):
    """The adapter does nothing, and further steps would not change that."""


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
    benign_cosine_by_layer: Mapping[str, float]
    """By 0-based block, at every adapted one and every target."""
    harmful_cosine_by_layer: Mapping[str, float]


def train_adapter(
    recipe: Recipe,
    *,
    model_dir: Path,
    rows: TrainingRows,
    out: Path,
    revision: str = "",
    device: str = "cpu",
    processes: Processes | None = None,
    console: Console | None = None,
) -> AdapterResult:
    """Train the adapter of `recipe` and write it to `out`/adapter.

    A killed run goes on from its last checkpoint when called again with the same arguments, with
    any number of processes; a complete one returns its result. All processes call this alike and
    get the same result; the main one alone writes files.

    Args:
        model_dir: local directory of the base model; the adapter names `recipe.model` as its base.
        out: directory of this run alone.
        revision: of the base model, as ResolvedModel has it: a run on other weights does not go on.
        device: "cpu" or "cuda", for processes that are not given.
        processes: those that train together; found from the launcher's environment if not given.
        console: where a progress bar goes; none means no progress bar.
    Raises:
        ConfigError: `out` belongs to a run with other settings, weights or data, the recipe does
            not fit the model, or loss, gradient or adapter are no longer finite.
        PinnedError: after half of the steps, the latest ten have rerouted nothing.
        DataError: a kind of conversation is missing or cannot be rendered.
        ModelError: the model cannot be loaded or has no chat template.
    """
    processes = processes or Processes(recipe, device)
    tokenizer = load_tokenizer(model_dir, recipe.chat_template)
    retain = _render("benign", rows.retain, tokenizer, recipe)
    blanked = blank_prompts(
        rows.harmful, share=recipe.data.blank_prompt_share, seed=recipe.seed, tokenizer=tokenizer
    )
    harmful = _render("harmful", blanked.conversations, tokenizer, recipe)
    digest = _run_digest(recipe, revision, retain.rows, harmful.rows)
    if processes.agreed((out / "result.json").exists(), f"results in {out}"):
        return _read_result(out, digest)
    if processes.is_main:
        out.mkdir(parents=True, exist_ok=True)
    model = ParallelStreams(recipe, model_dir, processes)
    _run_steps(recipe, model, retain.rows, harmful.rows, out, digest, console)
    _write_adapter(model, out / "adapter", recipe.model)
    benign = _heldout(rows.heldout_retain, tokenizer, recipe, model)
    rerouted = _heldout(rows.heldout_harmful, tokenizer, recipe, model)
    entries = read_metrics(out / "metrics.jsonl")
    result = AdapterResult(
        adapter_dir=out / "adapter",
        metrics_path=out / "metrics.jsonl",
        target_layers=model.streams.targets,
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
        benign_cosine_by_layer=benign.by_layer,
        harmful_cosine_by_layer=rerouted.by_layer,
    )
    if processes.is_main:
        _write_result(out, result, digest)
        # The result now stands for the run; a checkpoint is several times the adapter's size.
        (out / "checkpoint.safetensors").unlink()
        logger.info(
            "adapter trained: steps=%d seconds=%.1f num_blanked=%d benign_cosine=%s "
            "harmful_cosine=%s",
            result.steps,
            result.seconds,
            result.num_blanked,
            result.benign_cosine,
            result.harmful_cosine,
        )
    return result


def _run_steps(
    recipe: Recipe,
    model: ParallelStreams,
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
    processes = model.processes
    checkpoint_path = out / "checkpoint.safetensors"
    checkpoint = load_checkpoint(checkpoint_path, run_digest=digest)
    done = processes.agreed(checkpoint.step if checkpoint else 0, f"checkpoints in {out}")
    if checkpoint is not None:
        model.restore(checkpoint.tensors)
        logger.info("resuming: step=%d of %d", done, recipe.steps)
    model.streams.set_dropout(True)
    log = None
    if processes.is_main:
        log = RunLog(out / "metrics.jsonl", steps=recipe.steps, done=done, console=console)
    recent: deque[float] = deque(maxlen=_PINNED_STEPS)
    with log or nullcontext():
        for step in range(done, recipe.steps):
            rows = plan[step]
            entry = take_step(
                recipe,
                model,
                [retain[i] for i in rows.retain],
                [harmful[i] for i in rows.harmful],
                step,
            )
            if log is not None:
                log.step(entry)
            recent.append(entry["reroute_cosine"])
            if step + 1 >= recipe.steps // 2:
                _check_not_pinned(recipe, step + 1, recent)
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                tensors = model.whole_state()
                # No later loss tells of the last step, and no norm of what DeepSpeed does.
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    raise not_finite(recipe, "the adapter is not finite", step)
                if processes.is_main:
                    save_checkpoint(
                        checkpoint_path, run_digest=digest, step=step + 1, tensors=tensors
                    )


def _check_not_pinned(recipe: Recipe, step: int, cosines: Sequence[float]) -> None:
    """Pass if the adapter has left the identity, as far as the latest steps show.

    A retain loss that outweighs the reroute loss in the first steps shrinks the adapter to nothing,
    where the slope of the cosine is nothing, too: no later step gets it away.
    """
    if len(cosines) < _PINNED_STEPS or min(cosines) < _PINNED_COSINE:
        return
    objective = recipe.objective
    raise PinnedError(
        f"after {step} of {recipe.steps} steps the adapter reroutes nothing: cosine of adapted and "
        f"base states of harmful responses is {min(cosines):.5f}, expected below "
        f"{_PINNED_COSINE}; lower objective.retain_weight (now {objective.retain_weight}), or "
        f"raise objective.retain_smoothing (now {objective.retain_smoothing}) or learning_rate "
        f"(now {recipe.learning_rate}), and train into another output directory"
    )


def _write_adapter(model: ParallelStreams, directory: Path, base_name: str) -> None:
    """The adapter, in a directory that is either whole or not there."""
    weights = model.whole_parameters()
    if not model.processes.is_main:
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.streams.save_adapter(partial, base_name=base_name, weights=weights)
    publish(partial, directory)


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
    conversations: Sequence[Conversation], tokenizer: Any, recipe: Recipe, model: ParallelStreams
) -> HeldoutCosine:
    rendered = render_all(tokenizer, conversations, max_length=recipe.max_length)
    sources = [conversations[i].source for i in rendered.kept]
    return heldout_cosine(model, rendered.rows, sources, batch_size=2 * recipe.batch_size)


def _run_digest(
    recipe: Recipe, revision: str, retain: Sequence[Rendered], harmful: Sequence[Rendered]
) -> str:
    """sha256 of all that decides the adapter: settings, weights and the very tokens trained on."""
    digest = hashlib.sha256(f"{recipe.training_digest()} {revision}\n".encode())
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
            f"{str(out)!r} holds an adapter trained with other settings, weights or data; expected "
            "an empty directory or the run to go on with; choose another output directory or "
            "delete it"
        )
    for name in ("adapter_dir", "metrics_path"):
        fields[name] = out / fields[name]
    fields["target_layers"] = tuple(fields["target_layers"])
    return AdapterResult(**fields)
