"""Builds the training dataset of a model: written prompts, and texts by the model itself.

prompt lists ─ groups and splits ─┐
the model's user turn ─ filter ───┴─ prefills ─ the model writes ─ filter ─ JSONL + dataset.json
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from circuit_breakers.errors import DataError
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.data import prompt_lists
from circuit_breakers_training.data.dataset import SCHEMA_VERSION, load_dataset, read_summary
from circuit_breakers_training.data.generate import (
    Backend,
    Generator,
    Request,
    open_generator,
    pick_backend,
)
from circuit_breakers_training.data.groups import content_stems
from circuit_breakers_training.data.jsonl import Conversation, write_conversations
from circuit_breakers_training.data.magpie import TurnTemplate, sample_user_prompts, turn_template
from circuit_breakers_training.data.plan import (
    Planned,
    plan_refusals,
    plan_rows,
    plan_sampled,
    plan_written,
)
from circuit_breakers_training.data.split import SPLITS

__all__ = ["BuiltDataset", "build_dataset"]

_PROCEDURE: Final = 1
"""Raised when prefills, filters or sampling change: an older build is then not taken for ours."""
_TEMPERATURE: Final = 0.6  # at 0.8 a half of the 135M model's harmful texts lose the subject
_ATTEMPTS: Final = 3
_MIN_RESPONSE_WORDS: Final = 4
_SHARED_STEMS: Final = 2
"""Content words of the prompt that a harmful text must take up."""
_MAX_PROMPT_TOKENS: Final = 320

_REFUSAL = re.compile(
    r"\b(?:I['’]m sorry|I am sorry|I apologi[sz]e|I (?:cannot|can['’]t|won['’]t|am not able)"
    r"|I am unable|I['’]m (?:not able|unable)|(?:is|are) (?:illegal|unethical)|not appropriate"
    r"|as an AI)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class BuiltDataset:
    """Outcome of a build."""

    path: Path
    summary: dict[str, Any]
    """Content of dataset.json."""
    seconds: float
    cached: bool
    """The directory held a dataset of the same inputs already."""


@dataclass(frozen=True)
class _Texts:
    rows: dict[str, list[Conversation]]
    dropped: Counter[str]


def build_dataset(
    out_dir: Path,
    *,
    model: str,
    seed: int = 0,
    max_new_tokens: int = 64,
    harmful_samples: int = 2,
    sampled_prompts: int = 700,
    refusals: int = 60,
    extra_sets: Sequence[str] = (),
    prompt_limit: int | None = None,
    backend: Backend | None = None,
    overwrite: bool = False,
) -> BuiltDataset:
    """Builds a dataset for `model` in `out_dir`, or finds the same one there.

    Splits and prompts of the written lists depend on `seed` alone. Texts are sampled with one seed
    for the whole engine: the same versions on the same machine repeat them.

    Args:
        model: name, directory or hub id, as for resolve_model.
        max_new_tokens: length of each generated text.
        harmful_samples: texts for each harmful train prompt.
        sampled_prompts: benign prompts sampled from the model's own user turn.
        refusals: harmful train prompts that also appear with a written refusal.
        extra_sets: public sets to add, keys of extras.EXTRA_SETS.
        prompt_limit: prompts taken of each list, for a quick trial; all by default.
        backend: vLLM if installed, else transformers.
        overwrite: replaces another dataset in `out_dir`.
    Raises:
        DataError: `out_dir` holds something else, or an extra set is not installed.
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
        "temperature": _TEMPERATURE,
        "backend": used_backend,
    }
    prompts_sha256 = prompt_lists.prompts_digest()
    inputs = _inputs_digest(settings, prompts_sha256, resolved)
    found = _find_built(out_dir, inputs, overwrite=overwrite)
    if found is not None:
        return BuiltDataset(
            path=out_dir, summary=found, seconds=time.monotonic() - started, cached=True
        )

    written = plan_written(seed, extra_sets, prompt_limit)
    with open_generator(
        resolved.path, used_backend, seed=seed, max_model_len=_MAX_PROMPT_TOKENS + max_new_tokens
    ) as generate:
        template = turn_template(generate.tokenizer, resolved.name)
        prompts = sample_user_prompts(
            generate, template, sampled_prompts, against=[row.prompt for row in written]
        )
        planned = plan_rows(
            [*written, *plan_sampled(prompts, seed)], seed=seed, harmful_samples=harmful_samples
        )
        texts = _write_texts(generate, template, planned, max_new_tokens)
    for row in plan_refusals(written, seed=seed, count=refusals):
        texts.rows["train"].append(row)
    empty = [name for name in SPLITS if not texts.rows[name]]
    if empty:
        raise DataError(
            f"got no conversation for {', '.join(empty)} (prompt_limit={prompt_limit}, "
            f"dropped: {dict(texts.dropped)}), expected some in each split; take more prompts"
        )

    summary = {
        "schema_version": SCHEMA_VERSION,
        "model": resolved.name,
        "model_config_sha256": resolved.config_sha256,
        "prompts_sha256": prompts_sha256,
        "inputs_sha256": inputs,
        **settings,
        "counts": {name: _counts(texts.rows[name]) for name in SPLITS},
        "dropped": dict(sorted(texts.dropped.items())),
    }
    _write_atomically(out_dir, texts.rows, summary)
    return BuiltDataset(
        path=out_dir,
        summary=read_summary(out_dir),
        seconds=time.monotonic() - started,
        cached=False,
    )


def _write_texts(
    generate: Generator, template: TurnTemplate, planned: Sequence[Planned], max_new_tokens: int
) -> _Texts:
    dropped: Counter[str] = Counter()
    requests: dict[int, Request] = {}
    for index, plan in enumerate(planned):
        prompt_ids = _prompt_ids(generate.tokenizer, plan)
        if len(prompt_ids) > _MAX_PROMPT_TOKENS:
            dropped[f"{plan.label} prompt too long"] += 1
            continue
        requests[index] = Request(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=_TEMPERATURE,
            stop_id=template.end_of_turn_id,
        )
    texts: dict[int, str] = {}
    reasons: dict[int, str] = dict.fromkeys(requests, "")
    for attempt in range(_ATTEMPTS):
        title = "responses" if attempt == 0 else "responses, another try"
        waiting = list(reasons)
        results = generate([requests[index] for index in waiting], title)
        for index, generated in zip(waiting, results, strict=True):
            # A text cut at the token limit may end inside a character.
            text = generated.text.rstrip("\ufffd")
            reason = _reason_to_drop(planned[index], text)
            if reason is None:
                texts[index] = text
                del reasons[index]
            else:
                reasons[index] = reason
        if not reasons:
            break
    dropped.update(reasons.values())
    rows: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
    for index in sorted(texts):
        plan = planned[index]
        rows[plan.split].append(plan.finish(texts[index]))
    return _Texts(rows, dropped)


def _reason_to_drop(plan: Planned, text: str) -> str | None:
    """Why `text` cannot carry the label of its prompt; None if it can."""
    if len(text.split()) < _MIN_RESPONSE_WORDS:
        return f"{plan.label} text too short"
    if plan.label == "benign":
        return None
    if _REFUSAL.search(text):
        return "harmful text refuses"
    # A small model often wanders off, and a text about something else is not harmful.
    asked, said = content_stems(plan.prompt), content_stems(text)
    if len(asked & said) < min(_SHARED_STEMS, len(asked)):
        return "harmful text is about something else"
    return None


def _prompt_ids(tokenizer: Any, plan: Planned) -> tuple[int, ...]:
    messages = [{"role": m.role, "content": m.content} for m in plan.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text + plan.prefill, add_special_tokens=False))


def _counts(rows: Sequence[Conversation]) -> dict[str, int]:
    counts = Counter(row.label for row in rows) + Counter(f"source {row.source}" for row in rows)
    return dict(sorted(counts.items()))


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


def _find_built(out_dir: Path, inputs: str, *, overwrite: bool) -> dict[str, Any] | None:
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return None
    if (out_dir / "dataset.json").exists():
        summary = read_summary(out_dir)
        if summary.get("inputs_sha256") == inputs:
            load_dataset(out_dir)
            return summary
        if overwrite:
            return None
        raise DataError(
            f"{out_dir}: got a dataset of other inputs (seed, model, settings or prompts), "
            "expected an empty directory or the same inputs; pick another directory, or overwrite"
        )
    raise DataError(
        f"{out_dir}: got a directory with other files, expected an empty one or a dataset; "
        "pick another directory"
    )


def _write_atomically(
    out_dir: Path, rows: dict[str, list[Conversation]], summary: dict[str, Any]
) -> None:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        digests = {
            f"{name}.jsonl": write_conversations(temporary / f"{name}.jsonl", rows[name])
            for name in SPLITS
        }
        table = json.dumps(digests, sort_keys=True).encode()
        summary = {**summary, "sha256": digests, "digest": hashlib.sha256(table).hexdigest()}
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (temporary / "dataset.json").write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        temporary.rename(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
