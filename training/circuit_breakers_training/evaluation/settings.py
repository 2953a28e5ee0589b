"""What an evaluation is asked to do, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.data.generate import Backend
from circuit_breakers_training.evaluation.capability import check_lm_eval
from circuit_breakers_training.evaluation.llm_judge import JudgePrompt
from circuit_breakers_training.evaluation.suites import DEFAULT_SUITES
from circuit_breakers_training.probe.evaluate import EARLY_TOKENS

__all__ = [
    "EvaluationSettings",
    "check_at_least_one",
    "check_backend",
    "check_degenerate_share",
    "check_new",
    "check_skips",
    "check_temperature",
]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """One evaluation of one breaker."""

    artifact: Path
    """Directory of the breaker."""
    out: Path
    """Directory of the results, made new."""
    model: str | None = None
    """Base model; that of the manifest unless given."""
    data: Path | None = None
    """Built dataset, whose test split is used."""
    prompt_files: tuple[Path, ...] = ()
    """Files of prompts; a label that they have is not taken from the dataset."""
    suites: tuple[str, ...] = DEFAULT_SUITES
    limit: int = 100
    """Requests of each label in each suite, at most."""
    per_prompt: int = 1
    """Techniques that each request is put under."""
    max_new_tokens: int = 64
    stop_within: int = EARLY_TOKENS[0]
    """A text that the probe ends before this many tokens counts as stopped; a longer one is judged
    as far as it went."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    backend: Backend | None = None
    """vLLM if it is installed, else transformers."""
    degenerate_share: float = 0.05
    """Of the base model's benign answers, at most this share may count as degenerate, for each of
    the two statistics."""
    judge_url: str | None = None
    judge_model: str | None = None
    judge_prompt: JudgePrompt | None = None
    """What the judge is asked; None takes our own wording."""
    lm_eval_tasks: tuple[str, ...] = ()
    allow_unknown_overlap: bool = False
    keep_texts: bool = False
    """Texts of requests and answers go into results.json."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks what can be checked without the artifact.

        Raises:
            ConfigError: a setting is out of range or cannot take effect.
        """
        if not self.suites:
            raise ConfigError("got no suites, expected at least one; name one with --suite")
        check_at_least_one(self, "limit", "per_prompt", "max_new_tokens", "stop_within")
        check_temperature(self.temperature)
        check_backend(self.backend)
        check_degenerate_share(self.degenerate_share)
        if (self.judge_url is None) != (self.judge_model is None):
            raise ConfigError(
                "got one of --judge-url and --judge-model, expected both or none; add the other"
            )
        if self.judge_prompt is not None and self.judge_url is None:
            raise ConfigError(
                "got --judge-prompt without --judge-url, expected both; add the URL of a judge"
            )
        if self.judge_url and urlsplit(self.judge_url).scheme not in ("http", "https"):
            raise ConfigError(
                f"got --judge-url {self.judge_url!r}, expected an http or https URL; correct it"
            )
        if "lm-eval" in self.suites:
            check_lm_eval(self.lm_eval_tasks)
        elif self.lm_eval_tasks:
            raise ConfigError(
                "got --lm-eval-task without the suite lm-eval, expected both; add --suite lm-eval"
            )

    def to_json(self) -> dict[str, Any]:
        """Settings that decide the results, without paths of this machine."""
        return {
            "suites": list(self.suites),
            "prompt_files": [path.name for path in self.prompt_files],
            "limit": self.limit,
            "per_prompt": self.per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "stop_within": self.stop_within,
            "temperature": self.temperature,
            "seed": self.seed,
            "degenerate_share": self.degenerate_share,
            "judge_model": self.judge_model,
            "judge_prompt_sha256": None if self.judge_prompt is None else self.judge_prompt.sha256,
            "lm_eval_tasks": list(self.lm_eval_tasks),
        }


def check_at_least_one(settings: Any, *names: str) -> None:
    """Pass if each of these settings is at least 1.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"got {name} {getattr(settings, name)}, expected at least 1")


def check_temperature(temperature: float) -> None:
    """Pass for one that can be sampled at.

    Raises:
        ConfigError: it is below 0, or NaN.
    """
    if not temperature >= 0:
        raise ConfigError(f"got temperature {temperature}, expected 0 or more")


def check_backend(backend: str | None) -> None:
    """Pass for one that there is, and for None.

    Raises:
        ConfigError: there is no such backend.
    """
    if backend not in (None, *get_args(Backend)):
        raise ConfigError(
            f"got backend {backend!r}, expected {' or '.join(get_args(Backend))}; correct it"
        )


def check_degenerate_share(share: float) -> None:
    """Pass for a share of benign answers that degenerate text can be told by.

    Raises:
        ConfigError: it is not within 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"got a degenerate share of {share}, expected 0 to 1, exclusive")


def check_new(out: Path) -> None:
    """Pass if nothing is at `out`.

    Raises:
        ConfigError: something is.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"got --out {out}, which exists, expected a new directory; choose another"
        )


def check_skips(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """`names`, each once.

    Raises:
        ConfigError: one is not among the known ones.
    """
    skips, known = tuple(dict.fromkeys(names)), tuple(known)
    if unknown := [name for name in skips if name not in known]:
        raise ConfigError(
            f"got --skip {unknown[0]!r}, expected one of {', '.join(known)}; correct it"
        )
    return skips
