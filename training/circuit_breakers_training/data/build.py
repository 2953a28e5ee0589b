"""Builds the training dataset of a model: written prompts, and texts by the model itself.

prompt lists ─ groups and splits ─┐
the model's user turn ─ filter ───┴─ prefills ─ the model writes ─ filter ─ JSONL + dataset.json
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.data import prompt_lists
from circuit_breakers_training.data.dataset import (
    SCHEMA_VERSION,
    BuiltDataset,
    count_rows,
    find_dataset,
    read_summary,
    require_every_split,
    write_dataset,
)
from circuit_breakers_training.data.generate import Backend, pick_backend
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.data.kept_texts import (
    discard_texts,
    kept_texts,
    open_keeping_generator,
)
from circuit_breakers_training.data.magpie import sample_user_prompts, turn_template
from circuit_breakers_training.data.plan import (
    plan_after_refusals,
    plan_refusals,
    plan_rows,
    plan_sampled,
    plan_written,
)
from circuit_breakers_training.data.responses import (
    MAX_PROMPT_TOKENS,
    TEMPERATURE,
    write_responses,
)
from circuit_breakers_training.data.split import SPLITS
from circuit_breakers_training.recipes.config import ChatTemplate

__all__ = ["BuiltDataset", "build_dataset"]

_PROCEDURE: Final = 4
"""Raised when prefills, filters or sampling change: an older build is then not taken for ours."""


def build_dataset(
    out_dir: Path,
    *,
    model: str,
    seed: int = 0,
    max_new_tokens: int = 64,
    harmful_samples: int = 3,
    sampled_prompts: int = 700,
    refusals: int = 60,
    extra_sets: Sequence[str] = (),
    prompt_limit: int | None = None,
    chat_template: ChatTemplate = "model",
    backend: Backend | None = None,
    overwrite: bool = False,
) -> BuiltDataset:
    """Builds a dataset for `model` in `out_dir`, or finds the same one there.

    Splits and prompts of the written lists depend on `seed` alone. Texts are sampled with one seed
    for the whole engine: the same versions on the same machine repeat them. A build that was killed
    goes on with the texts that it had, when called again with the same arguments; the later ones
    are sampled with another seed, so they are not those of a run that went through.

    Args:
        model: name, directory or hub id, as for resolve_model.
        max_new_tokens: length of each generated text.
        harmful_samples: texts for each harmful train prompt: after first words, as it stands,
            reworded, as it stands, ...; 1 leaves rewording out.
        sampled_prompts: benign prompts sampled from the model's own user turn.
        refusals: harmful train prompts that also appear with a written refusal.
        extra_sets: public sets to add, keys of extras.EXTRA_SETS.
        prompt_limit: prompts taken of each list, for a quick trial; all by default.
        chat_template: the model's own, or the plain one for a model without.
        backend: vLLM if installed, else transformers.
        overwrite: replaces another dataset in `out_dir`.
    Raises:
        DataError: `out_dir` holds something else or is being built, or an extra set is not
            installed.
        ModelError: the model cannot be found or read.
        ConfigError: the backend is not installed.
    """
    started = time.monotonic()
    resolved = resolve_model(model)
    used_backend = pick_backend(backend)
    settings = {
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "harmful_samples": harmful_samples,
        "sampled_prompts": sampled_prompts,
        "refusals": refusals,
        "extra_sets": list(extra_sets),
        "prompt_limit": prompt_limit,
        "temperature": TEMPERATURE,
        "backend": used_backend,
    }
    if chat_template != "model":  # left out otherwise, so that datasets from before stay found
        settings["chat_template"] = chat_template
    prompts_sha256 = prompt_lists.prompts_digest()
    inputs = _inputs_digest(settings, prompts_sha256, resolved)
    found = find_dataset(out_dir, inputs, overwrite=overwrite)
    if found is not None:
        discard_texts(out_dir)
        return BuiltDataset(
            path=out_dir, summary=found, seconds=time.monotonic() - started, cached=True
        )

    written = plan_written(seed, extra_sets, prompt_limit)
    with kept_texts(out_dir, inputs) as kept:
        with open_keeping_generator(
            kept,
            resolved.path,
            used_backend,
            seed=seed,
            max_model_len=MAX_PROMPT_TOKENS + max_new_tokens,
            chat_template=chat_template,
        ) as generate:
            template = turn_template(generate.tokenizer, resolved.name)
            prompts = sample_user_prompts(
                generate, template, sampled_prompts, against=[row.prompt for row in written]
            )
            planned = plan_rows(
                [*written, *plan_sampled(prompts, seed)], seed=seed, harmful_samples=harmful_samples
            )
            planned += plan_after_refusals(written, seed=seed)
            texts = write_responses(generate, template, planned, max_new_tokens)
        rows: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
        for index, row in texts.rows.items():
            rows[planned[index].split].append(row)
        rows["train"] += plan_refusals(written, seed=seed, count=refusals)
        dropped = Counter(texts.dropped.values())
        require_every_split(rows, f"prompt_limit={prompt_limit}, dropped: {dict(dropped)}")

        summary = {
            "schema_version": SCHEMA_VERSION,
            "model": resolved.name,
            "model_config_sha256": resolved.config_sha256,
            "prompts_sha256": prompts_sha256,
            "inputs_sha256": inputs,
            **settings,
            "counts": {name: count_rows(rows[name]) for name in SPLITS},
            "dropped": dict(sorted(dropped.items())),
        }
        write_dataset(out_dir, rows, summary)
        discard_texts(out_dir)
    return BuiltDataset(
        path=out_dir,
        summary=read_summary(out_dir),
        seconds=time.monotonic() - started,
        cached=False,
    )


def _inputs_digest(settings: dict[str, Any], prompts_sha256: str, model: ResolvedModel) -> str:
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "procedure": _PROCEDURE,
        "prompts": prompts_sha256,
        "model": [model.name, model.revision, model.config_sha256],
        # Two checkpoints of one architecture share a config: their weights tell them apart.
        "weights": [
            [path.name, path.stat().st_size, _head_digest(path)]
            for path in sorted(model.path.glob("*.safetensors"))
        ],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _head_digest(path: Path) -> str:
    # The first 4 MiB hold the table of tensors and the start of the weights; a whole checkpoint
    # would take minutes to read.
    with path.open("rb") as file:
        return hashlib.sha256(file.read(4 << 20)).hexdigest()
