"""What an adapter gains with data, steps and layers: one trained adapter for each variant.

variants ─ train ─ merge ─┬ the adapted model writes ─ judges ─┬ one row each
                          │ the base model writes, once ──┘    │
                          └ perplexity of benign answers ──────┘

Asked the test split it explains, and does not choose: a recipe picked by its rows would have seen
them. To choose, ask the selection split. Adapters alone are compared, without a probe: it reads
what the adapter leaves, and its own quality is in each breaker's report.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Column, Table

from circuit_breakers.engine.merge import merge_adapter
from circuit_breakers.errors import ConfigError
from circuit_breakers.hardware import pick_device
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.adapter.trainer import PinnedError, TrainingRows, train_adapter
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.generate import Backend, pick_backend
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.evaluation.capability import benign_answers, benign_perplexity
from circuit_breakers_training.evaluation.completions import (
    Completion,
    Sampling,
    render_attempts,
    write_completions,
)
from circuit_breakers_training.evaluation.degeneration import DegenerateLimits
from circuit_breakers_training.evaluation.prompts import dataset_prompts
from circuit_breakers_training.evaluation.rates import rate
from circuit_breakers_training.evaluation.settings import EvaluationSettings
from circuit_breakers_training.evaluation.sides import judge_texts, reference_limits
from circuit_breakers_training.evaluation.suites import Attempt, build_attempts, reference_attempts
from circuit_breakers_training.fluency import LanguageModel
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import ChatTemplate, Recipe
from circuit_breakers_training.recipes.resolution import Override, parse_override, resolve_recipe
from circuit_breakers_training.stages import training_rows

__all__ = [
    "AskedSplit",
    "CurveSettings",
    "Variant",
    "in_share",
    "learning_curve",
    "parse_variant",
    "print_curve",
]

DATA_SHARE: Final = "data_share"
AskedSplit = Literal["selection", "test"]
_SUITES: Final = ("direct", "prefill", "wrappers", "past-tense")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One adapter to train: the recipe with fields changed, or with less data."""

    name: str
    overrides: tuple[Override, ...] = ()
    data_share: float = 1.0
    """Share of the training groups of each label."""


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """Which adapters are trained and how they are asked."""

    data: Path
    """Built dataset."""
    split: AskedSplit = "test"
    """Whose requests are asked, and whose benign answers are read: test to explain, selection to
    choose a recipe by."""
    out: Path
    """Adapters and results. A run that was stopped goes on there."""
    recipe: str
    """Name of a recipe, or path of a TOML file."""
    variants: tuple[Variant, ...]
    limit: int = 50
    """Requests of each suite, at most."""
    max_new_tokens: int = 64
    seed: int = 0
    backend: Backend | None = None
    """vLLM if it is installed, else transformers."""

    @property
    def curve_path(self) -> Path:
        """The results, a file for each split."""
        return self.out / f"curve-{self.split}.json"


def parse_variant(text: str) -> Variant:
    """The variant that FIELD=VALUE names, or several of them with ";" between.

    The field data_share takes a share of the data.

    Raises:
        ConfigError: a part is no FIELD=VALUE, VALUE is not TOML, or the share is not above 0 and up
            to 1.
    """
    overrides = [parse_override(part) for part in text.split(";")]
    shares: list[Any] = [o.value for o in overrides if o.field == DATA_SHARE]
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"got {DATA_SHARE}={share!r}, expected a number above 0 and up to 1")
    return Variant(
        name="; ".join(f"{o.field}={json.dumps(o.value)}" for o in overrides),
        overrides=tuple(o for o in overrides if o.field != DATA_SHARE),
        data_share=float(shares[-1]) if shares else 1.0,
    )


def learning_curve(settings: CurveSettings, console: Console | None = None) -> dict[str, Any]:
    """Trains and judges an adapter for each variant; also written to `out`/curve-SPLIT.json.

    Returns one row a variant, after one of the base model; the row of an adapter that stays pinned
    at the identity has the reason under "pinned", and no figures.

    Raises:
        ConfigError: a field is unknown or out of range.
        DataError: the dataset cannot be read, or a suite is empty.
        ModelError: the model cannot be found or read.
        CalibrationError: too few benign answers to tell degenerate text by.
    """
    recipes = [resolve_recipe(settings.recipe, v.overrides).recipe for v in settings.variants]
    asked = {f"{recipe.model} ({recipe.chat_template} template)" for recipe in recipes}
    if len(asked) != 1:
        raise ConfigError(
            f"got variants of {', '.join(sorted(asked)) or 'nothing'}, expected one model and one "
            "chat template; leave the fields model and chat_template to the recipe"
        )
    dataset = load_dataset(settings.data)
    if settings.split == "selection":
        dataset = replace(dataset, test=dataset.selection)
    prompts = dataset_prompts(dataset)
    attempts = [
        attempt
        for attempt in build_attempts(_SUITES, prompts, limit=settings.limit, per_prompt=1)
        if attempt.harmful
    ]
    model = resolve_model(recipes[0].model)
    reference = reference_attempts(prompts)
    judge = _Judge(settings, model, recipes[0].chat_template, attempts, reference, console)
    rows = [{"variant": "base model", "suites": judge.base}]
    settings.out.mkdir(parents=True, exist_ok=True)
    for variant, recipe in zip(settings.variants, recipes, strict=True):
        if console is not None:
            console.print(f"{variant.name} ...", highlight=False)
        try:
            rows.append(_row(variant, recipe, settings, dataset, model, judge, console))
        except PinnedError as error:
            rows.append({"variant": variant.name, "pinned": str(error)})
        results = {
            "data_sha256": dataset.digests,
            "split": settings.split,
            "limit": settings.limit,
            "rows": rows,
        }
        settings.curve_path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return results


class _Judge:
    """The same requests to each model, judged by the base model's own answers."""

    def __init__(
        self,
        settings: CurveSettings,
        model: ResolvedModel,
        chat_template: ChatTemplate,
        attempts: Sequence[Attempt],
        reference: Sequence[Attempt],
        console: Console | None,
    ) -> None:
        ids, self._longest = render_attempts(
            model,
            [*attempts, *reference],
            chat_template=chat_template,
            max_new_tokens=settings.max_new_tokens,
        )
        self._model, self._chat_template = model, chat_template
        self._attempts, self._console = attempts, console
        self._sampling = Sampling(
            settings.max_new_tokens, 0.0, settings.seed, pick_backend(settings.backend)
        )
        self._ids = ids[: len(attempts)]
        written = self._write(model.path, ids, "base model writes")
        self._limits: DegenerateLimits = reference_limits(
            LanguageModel(model.path),
            written[len(attempts) :],
            share=EvaluationSettings.degenerate_share,
            console=console,
        )
        self.base = self._rates(written[: len(attempts)])

    def __call__(self, merged_dir: Path) -> dict[str, Any]:
        """Requests answered on the subject by the adapted model, by suite."""
        return self._rates(self._write(merged_dir, self._ids, "adapted model writes"))

    def _write(self, path: Path, ids: Sequence[tuple[int, ...]], title: str) -> list[Completion]:
        return write_completions(
            path,
            self._model.name,
            ids,
            self._sampling,
            chat_template=self._chat_template,
            max_model_len=self._longest,
            title=title,
        )

    def _rates(self, completions: Sequence[Completion]) -> dict[str, Any]:
        verdicts = judge_texts(
            self._attempts,
            completions,
            self._limits,
            LanguageModel(self._model.path),
            self._console,
        )
        return {
            name: rate(
                verdict.complied
                for attempt, verdict in zip(self._attempts, verdicts, strict=True)
                if attempt.suite == name
            ).to_json()
            for name in _SUITES
        }


def _row(
    variant: Variant,
    recipe: Recipe,
    settings: CurveSettings,
    dataset: Dataset,
    model: ResolvedModel,
    judge: _Judge,
    console: Console | None,
) -> dict[str, Any]:
    rows = _share_of(training_rows(dataset, recipe), variant.data_share)
    # The split does not change an adapter, but the held-out cosines that stand beside it.
    identity = [
        *(recipe.training_digest(), dataset.digests, variant.data_share, settings.split),
        *(model.revision, model.config_sha256),
    ]
    slug = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    processes = Processes(recipe, pick_device())
    result = train_adapter(
        recipe,
        model_dir=model.path,
        revision=model.revision,
        rows=rows,
        out=settings.out / f"adapter-{slug}",
        processes=processes,
        console=console,
    )
    # What training held of a GPU, the models that write next need.
    processes.leave()
    merged = settings.out / f"merged-{slug}"
    shutil.rmtree(merged, ignore_errors=True)
    try:
        merge_adapter(model.path, result.adapter_dir, merged)
        suites = judge(merged)
        perplexity = benign_perplexity(
            {"base": model.path, "adapter": merged},
            benign_answers(dataset, limit=settings.limit),
            chat_template=recipe.chat_template,
            max_length=recipe.max_length,
            console=console,
        )
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    return {
        "variant": variant.name,
        "num_harmful": len(rows.harmful),
        "num_benign": len(rows.retain),
        "steps": result.steps,
        "target_layers": list(result.target_layers),
        "seconds": result.seconds,
        "benign_cosine": result.benign_cosine,
        "harmful_cosine": result.harmful_cosine,
        "suites": suites,
        "benign_perplexity": perplexity,
    }


def in_share(row: Conversation, share: float) -> bool:
    """Whether a row is in a share of the groups; a larger share holds all that a smaller does."""
    digest = hashlib.sha256(f"{DATA_SHARE}\0{row.group}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _share_of(rows: TrainingRows, share: float) -> TrainingRows:
    return replace(
        rows,
        retain=[row for row in rows.retain if in_share(row, share)],
        harmful=[row for row in rows.harmful if in_share(row, share)],
    )


def print_curve(results: Mapping[str, Any]) -> None:
    """A table on standard output, one row a variant."""
    table = Table(
        Column("variant", min_width=28),
        *(
            "harmful",
            "benign",
            "steps",
            "layers",
            "seconds",
            "cosine benign",
            "harmful",
            "perplexity",
            "doubled",
        ),
        *_SUITES,
        title=f"harmful requests of the {results['split']} split answered on the subject, after "
        "training on so many conversations",
    )
    for row in results["rows"]:
        facts = [""] * 9
        if "steps" in row:
            perplexity = row["benign_perplexity"]["perplexity"]["all"]
            num_answers = row["benign_perplexity"]["num_conversations"]["all"]
            facts = [
                str(row["num_harmful"]),
                str(row["num_benign"]),
                str(row["steps"]),
                ",".join(map(str, row["target_layers"])),
                f"{row['seconds']:.0f}",
                f"{row['benign_cosine']:.3f}",
                f"{row['harmful_cosine']:.3f}",
                f"{perplexity['adapter_change']:+.1%}",
                f"{perplexity['adapter_doubled']}/{num_answers}",
            ]
        suites = ["pinned"] * ("pinned" in row)
        if "suites" in row:
            suites = [f"{row['suites'][s]['count']}/{row['suites'][s]['num']}" for s in _SUITES]
        table.add_row(row["variant"], *facts, *suites)
    Console(width=None if Console().is_terminal else 160).print(table)
