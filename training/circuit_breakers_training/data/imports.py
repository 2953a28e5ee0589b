"""Makes a dataset from published data, in the layout that `data build` writes.

sources ─ formats ─ duplicates ─ groups and splits ─ the model answers open prompts ─ JSONL
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers.models import ResolvedModel, resolve_model
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
from circuit_breakers_training.data.lengths import open_tokenizer, token_lengths
from circuit_breakers_training.data.magpie import turn_template
from circuit_breakers_training.data.overlap import nearly_overlapping, prompt_digests
from circuit_breakers_training.data.plan import Planned, plan_rows
from circuit_breakers_training.data.pool import Pool, Row
from circuit_breakers_training.data.responses import MAX_PROMPT_TOKENS, write_responses
from circuit_breakers_training.data.sources import (
    Located,
    SourceRows,
    SourceSpec,
    locate,
    read_evaluation_rows,
    read_source,
)
from circuit_breakers_training.data.split import SPLITS, split_of
from circuit_breakers_training.recipes.config import ChatTemplate

__all__ = ["MissingAnswers", "import_dataset"]

MissingAnswers = Literal["refuse", "drop", "write"]
"""What happens to prompts without an answer."""

_PROCEDURE: Final = 1
"""Raised when formats, groups or filters change: an older import is then not taken for ours."""


def import_dataset(
    out_dir: Path,
    sources: Sequence[SourceSpec],
    *,
    seed: int = 0,
    exclude: Sequence[str] = (),
    missing_answers: MissingAnswers = "refuse",
    model: str | None = None,
    chat_template: ChatTemplate = "model",
    max_length: int = 512,
    max_new_tokens: int = 64,
    backend: Backend | None = None,
    overwrite: bool = False,
) -> BuiltDataset:
    """Makes a dataset of `sources` in `out_dir`, or finds the same one there.

    Splits depend on `seed` and on the prompts, not on the order of rows or sources. An import that
    was killed goes on with the answers that it had, as a build does.

    Args:
        exclude: locations of prompts to keep out, as of an evaluation set: rows that ask for the
            same, or for nearly the same, are dropped.
        missing_answers: refuse such prompts, drop them, or have `model` write the answers.
        model: whose tokenizer measures the lengths, and who writes missing answers.
        chat_template: the model's own, or the plain one for a model without.
        max_length: tokens above which a conversation is counted as too long; nothing is cut.
        max_new_tokens: length of each answer that is written.
        backend: for writing; vLLM if installed, else transformers.
        overwrite: replaces another dataset in `out_dir`.
    Raises:
        DataError: `out_dir` holds something else or is being built, a source is missing, broken or
            for evaluation only, prompts lack answers, or a split comes out empty.
        ModelError: the model cannot be found or read.
        ConfigError: no model for missing answers or for the plain template, or the backend is not
            installed.
    """
    started = time.monotonic()
    if not sources:
        raise DataError("got no source, expected at least one file or hub name; name one")
    if chat_template != "model" and model is None:
        raise ConfigError(
            f"got the {chat_template} chat template without a model, expected the one whose "
            "conversations it renders; name it with --model, or leave --plain-template out"
        )
    writer = _writer(missing_answers, model)
    used_backend = pick_backend(backend) if writer is not None else None
    located = [locate(spec) for spec in sources]
    kept_out = [locate(SourceSpec(location=location)) for location in exclude]
    settings: dict[str, Any] = {
        "seed": seed,
        "exclude": [source.describe() for source in kept_out],
        "missing_answers": missing_answers,
        "model": model,
        "model_config_sha256": writer.config_sha256 if writer else None,
        "max_length": max_length if model is not None else None,
        "max_new_tokens": max_new_tokens if writer else None,
        "backend": used_backend,
    }
    if chat_template != "model":  # left out otherwise, so that datasets from before stay found
        settings["chat_template"] = chat_template
    described = [source.describe() for source in located]
    inputs = _inputs_digest(settings, described, writer)
    found = find_dataset(out_dir, inputs, overwrite=overwrite)
    if found is not None:
        discard_texts(out_dir)
        return BuiltDataset(
            path=out_dir, summary=found, seconds=time.monotonic() - started, cached=True
        )

    # What can be refused is refused before large files are read.
    tokenizer = open_tokenizer(model, chat_template) if model is not None else None
    read = [read_source(source, seed=seed) for source in located]
    pool = _pool(
        read, [row.prompt for source in kept_out for row in read_evaluation_rows(source).rows]
    )
    _settle_answers(pool, located, missing_answers)
    pool.merge_groups()
    with kept_texts(out_dir, inputs) as kept:
        if writer is not None and used_backend is not None:
            _write_answers(
                pool,
                writer,
                used_backend,
                kept,
                chat_template,
                seed=seed,
                max_new_tokens=max_new_tokens,
            )
        distinct: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
        rows: dict[str, list[Conversation]] = {name: [] for name in SPLITS}
        for entry in pool.entries:
            assert isinstance(entry.row, Conversation)
            split = split_of(entry.row.group, seed=seed)
            distinct[split].append(entry.row)
            rows[split] += [entry.row] * (sources[entry.source].repeat if split == "train" else 1)
        dropped = [source.dropped + pool.dropped[k] for k, source in enumerate(read)]
        total = sum(dropped, Counter[str]())
        require_every_split(rows, f"{len(pool.entries)} rows kept, dropped: {dict(total)}")

        num_kept = Counter(entry.source for entry in pool.entries)
        summary = {
            "schema_version": SCHEMA_VERSION,
            "inputs_sha256": inputs,
            **settings,
            "sources": [
                {
                    **described[k],
                    "format": source.format,
                    "read": source.num_read,
                    "kept": num_kept[k],
                    "dropped": dict(sorted(dropped[k].items())),
                }
                for k, source in enumerate(read)
            ],
            "counts": {name: count_rows(rows[name]) for name in SPLITS},
            "dropped": dict(sorted(total.items())),
            "repeated": len(rows["train"]) - len(distinct["train"]),
            **pool.group_sizes(),
            "prompts": {name: _fingerprint(distinct[name]) for name in SPLITS},
            "token_lengths": _lengths(distinct, tokenizer, max_length),
        }
        write_dataset(out_dir, rows, summary)
        discard_texts(out_dir)
    return BuiltDataset(
        path=out_dir,
        summary=read_summary(out_dir),
        seconds=time.monotonic() - started,
        cached=False,
    )


def _writer(missing_answers: MissingAnswers, model: str | None) -> ResolvedModel | None:
    if missing_answers not in get_args(MissingAnswers):
        raise ConfigError(
            f"got missing answers {missing_answers!r}, expected one of "
            f"{', '.join(get_args(MissingAnswers))}; correct it"
        )
    if missing_answers != "write":
        return None
    if model is None:
        raise ConfigError(
            "got no model to write the missing answers, expected the one that you train a breaker "
            "for; name it"
        )
    return resolve_model(model)


def _inputs_digest(
    settings: dict[str, Any], described: list[dict[str, Any]], writer: ResolvedModel | None
) -> str:
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "procedure": _PROCEDURE,
        "settings": settings,
        "sources": described,
        "writer": [writer.name, writer.revision] if writer else None,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _pool(read: Sequence[SourceRows], excluded: Sequence[str]) -> Pool:
    pool = Pool([source.rows for source in read])
    pool.drop_duplicates()
    if excluded:
        near = set(nearly_overlapping(excluded, pool.user_turns()))
        pool.drop_if(lambda row: any(m.content in near for m in row.messages), "excluded prompt")
    return pool


def _settle_answers(
    pool: Pool, located: Sequence[Located], missing_answers: MissingAnswers
) -> None:
    if missing_answers == "drop":
        pool.drop_if(lambda row: isinstance(row, Planned), "no answer")
    missing = Counter(e.source for e in pool.entries if isinstance(e.row, Planned))
    if missing and missing_answers == "refuse":
        counts = ", ".join(f"{n} in {located[k].spec.location}" for k, n in missing.items())
        raise DataError(
            f"got prompts without an answer ({counts}), expected an answer to each; have the "
            "model that you train a breaker for write them (--missing-answers write --model "
            "NAME), leave them out (--missing-answers drop), or pass a file with answers"
        )


def _write_answers(
    pool: Pool,
    writer: ResolvedModel,
    backend: Backend,
    kept: Path,
    chat_template: ChatTemplate,
    *,
    seed: int,
    max_new_tokens: int,
) -> None:
    """Puts conversations in place of open prompts, or drops those that get no usable answer."""
    plans = [entry.row for entry in pool.entries if isinstance(entry.row, Planned)]
    if not plans:
        return
    planned = plan_rows(plans, seed=seed, harmful_samples=1)
    with open_keeping_generator(
        kept,
        writer.path,
        backend,
        seed=seed,
        max_model_len=MAX_PROMPT_TOKENS + max_new_tokens,
        chat_template=chat_template,
    ) as generate:
        template = turn_template(generate.tokenizer, writer.name)
        responses = write_responses(generate, template, planned, max_new_tokens)
    numbers = iter(range(len(plans)))

    def answer(row: Row) -> Row | str:
        if isinstance(row, Conversation):
            return row
        number = next(numbers)
        return responses.rows.get(number) or responses.dropped[number]

    pool.replace_rows(answer)


def _fingerprint(rows: Sequence[Conversation]) -> dict[str, Any]:
    """Number of prompts, and a digest over their digests; these are Dataset.prompt_digests."""
    digests = prompt_digests(rows)
    return {"count": len(digests), "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()}


def _lengths(
    rows: Mapping[str, Sequence[Conversation]], tokenizer: Any, max_length: int
) -> dict[str, dict[str, int]] | None:
    if tokenizer is None:
        return None
    everything = [row for name in SPLITS for row in rows[name]]
    return token_lengths(tokenizer, everything, max_length=max_length)
