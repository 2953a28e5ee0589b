"""What an attack is asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import urlsplit

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.data.generate import Backend
from circuit_breakers_training.evaluation.settings import (
    check_at_least_one,
    check_backend,
    check_degenerate_share,
    check_temperature,
)

__all__ = ["METHODS", "TARGETS", "AttackSettings", "Method", "SearchSettings", "SoftPromptSettings"]

Target = Literal["base", "adapter", "probe", "both"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

Method = Literal["best-of-n", "genetic"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)

_PRIVATE = frozenset(
    {"artifact", "out", "data", "model", "api_key", "url", "backend", "overwrite", "concurrency"}
)
"""Paths of a machine, secrets, and what does not decide the results."""


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """What both attackers share."""

    artifact: Path
    """Directory of the breaker."""
    data: Path
    """Built dataset, whose test split's harmful requests are asked."""
    out: Path
    """Directory of the results, made new."""
    model: str | None = None
    """Base model; that of the manifest unless given."""
    limit: int = 20
    """Requests, at most."""
    max_new_tokens: int = 64
    seed: int = 0
    backend: Backend | None = None
    """What writes the base model's benign answers, by which degenerate text is told: vLLM if it is
    installed, else transformers."""
    degenerate_share: float = 0.05
    """Of these answers, at most this share may count as degenerate."""
    allow_unknown_overlap: bool = False
    save_texts: bool = False
    """Completions go into a file beside the results."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks what can be checked without the artifact.

        Raises:
            ConfigError: a setting is out of range or cannot take effect.
        """
        check_at_least_one(self, "limit", "max_new_tokens")
        check_backend(self.backend)
        check_degenerate_share(self.degenerate_share)

    @property
    def answer_temperature(self) -> float:
        """At which answers are written; the benign ones that they are compared with, too."""
        return 0.0

    def to_json(self) -> dict[str, Any]:
        """Settings that decide the results, without paths and secrets."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PRIVATE}


@dataclass(frozen=True, kw_only=True)
class SoftPromptSettings(AttackSettings):
    """The attacker who holds weights, adapter and probe."""

    steps: int = 200
    """Updates of a soft prompt, at most."""
    tokens: int = 20
    """Embeddings of a soft prompt."""
    learning_rate: float = 0.03
    """Adam's."""
    penalty: float = 1.0
    """Weight of the probe's part of the loss: at 1, a logit of score counts as much as a nat of the
    answer's mean token."""
    margin: float = 1.0
    """How far below the threshold scores are pushed, in logits."""
    answer_tokens: int = 32
    """First tokens of the wanted answer that the loss asks for."""
    check_every: int = 10
    """Steps between two looks at what the model writes; the first step and those that are reported
    are looked at as well."""

    def __post_init__(self) -> None:
        """As the base class's."""
        super().__post_init__()
        check_at_least_one(self, "steps", "tokens", "answer_tokens", "check_every")
        if self.max_new_tokens < self.answer_tokens:
            raise ConfigError(
                f"got --max-new-tokens {self.max_new_tokens}, expected at least "
                f"{self.answer_tokens}, the tokens by which a wanted answer is known; raise it"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"got a learning rate of {self.learning_rate}, expected above 0")
        for name in ("penalty", "margin"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"got {name} {getattr(self, name)}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(AttackSettings):
    """The attacker who sees what any client sees."""

    url: str
    """The server, with or without /v1."""
    api_key: str | None = None
    queries: int = 100
    """To the server for each request and method, at most."""
    methods: tuple[Method, ...] = METHODS
    temperature: float = 1.0
    population: int = 8
    """Compositions of one generation of the genetic search."""
    concurrency: int = 8
    """Requests that are attacked at once."""

    @property
    def answer_temperature(self) -> float:
        """As the base class's: what is sampled surprises a model more than what is greedy."""
        return self.temperature

    def __post_init__(self) -> None:
        """As the base class's."""
        super().__post_init__()
        check_at_least_one(self, "queries", "concurrency")
        if self.population < 2:
            raise ConfigError(f"got a population of {self.population}, expected at least 2")
        check_temperature(self.temperature)
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise ConfigError(
                f"got methods {', '.join(self.methods) or 'none'}, expected some of "
                f"{', '.join(METHODS)}; correct them"
            )
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(
                f"got --url {self.url!r}, expected an http or https URL such as "
                "http://127.0.0.1:8000; correct it"
            )
