"""What both attackers start from: a breaker, its base model, and the requests to be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.errors import DataError
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers_training.attack.referee import Referee
from circuit_breakers_training.attack.settings import AttackSettings
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.generate import pick_backend
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.data.plan import REWORDED_SOURCES
from circuit_breakers_training.evaluation.completions import (
    Sampling,
    render_attempts,
    write_completions,
)
from circuit_breakers_training.evaluation.degeneration import check_num_texts
from circuit_breakers_training.evaluation.held_out import Overlap, check_held_out
from circuit_breakers_training.evaluation.prompts import dataset_prompts
from circuit_breakers_training.evaluation.results import check_out, environment
from circuit_breakers_training.evaluation.sides import reference_limits
from circuit_breakers_training.evaluation.suites import Attempt, evenly, reference_attempts
from circuit_breakers_training.fluency import LanguageModel

__all__ = ["Scene", "attacked_rows", "set_scene"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is the same for each way to attack."""

    breaker: Breaker
    model: ResolvedModel
    dataset: Dataset
    rows: list[Conversation]
    """Harmful conversations of the test split: a request, and the answer that is wanted."""
    overlap: Overlap
    reference: list[Attempt]

    def referee(self, settings: AttackSettings, console: Console | None) -> Referee:
        """Who says what counts as an answer; has the base model write benign ones first.

        Raises:
            CalibrationError: too few of them are of use.
        """
        ids, longest = render_attempts(
            self.model,
            self.reference,
            chat_template=self.breaker.chat_template,
            max_new_tokens=settings.max_new_tokens,
        )
        written = write_completions(
            self.model.path,
            self.model.name,
            ids,
            Sampling(
                settings.max_new_tokens,
                settings.answer_temperature,
                settings.seed,
                pick_backend(settings.backend),
            ),
            chat_template=self.breaker.chat_template,
            max_model_len=longest,
            title="benign answers",
        )
        base_model = LanguageModel(self.model.path)
        limits = reference_limits(
            base_model, written, share=settings.degenerate_share, console=console
        )
        return Referee(base_model, limits)

    def facts(self, settings: AttackSettings) -> dict[str, Any]:
        """What results say about where they come from."""
        return {
            "breaker": {"name": self.breaker.manifest.name, "digest": self.breaker.digest},
            "model": self.model.spec().model_dump(mode="json"),
            "settings": settings.to_json(),
            "data_sha256": self.dataset.digests,
            "overlap_with_training": self.overlap,
            "num_requests": len(self.rows),
            "environment": environment(pick_backend(settings.backend)),
        }


def set_scene(settings: AttackSettings) -> Scene:
    """The breaker, its model and the requests; what can be refused is refused here.

    Raises:
        ConfigError: `out` is taken.
        ArtifactError, BreakerMismatchError: the breaker is broken, or of another model.
        ModelError: the base model cannot be found or read.
        DataError: the dataset cannot be read, has no harmful request, or was seen in training.
        CalibrationError: too few benign requests to tell degenerate text by.
    """
    check_out(settings.out, overwrite=settings.overwrite)
    breaker = load_breaker(settings.artifact)
    model = resolve_model(settings.model or breaker.manifest.base_model.id)
    breaker.check_fits(model.spec())
    dataset = load_dataset(settings.data)
    rows = attacked_rows(dataset, limit=settings.limit)
    overlap = check_held_out(
        breaker,
        dataset,
        {"attack": [row.prompt for row in rows]},
        allow_unknown=settings.allow_unknown_overlap,
    )
    reference = reference_attempts(dataset_prompts(dataset))
    check_num_texts(len(reference), 0, share=settings.degenerate_share)
    return Scene(
        breaker=breaker,
        model=model,
        dataset=dataset,
        rows=rows,
        overlap=overlap,
        reference=reference,
    )


def attacked_rows(dataset: Dataset, *, limit: int) -> list[Conversation]:
    """Harmful conversations of the test split, each request once and in its first words.

    Raises:
        DataError: there is none.
    """
    found: dict[tuple[Message, ...], Conversation] = {}
    for row in dataset.test:
        if row.label == "harmful" and row.source not in REWORDED_SOURCES.values():
            found.setdefault(row.messages[:-1], row)
    if not found:
        raise DataError(
            f"got no harmful request among {len(dataset.test)} conversations of the test split, "
            "expected at least one to attack with; give another dataset with --data"
        )
    return list(evenly(list(found.values()), limit))
