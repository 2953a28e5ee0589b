"""Ways in which a black-box attacker puts a request, and how one way becomes another.

Augmentations after Hughes et al. (best-of-n jailbreaking, arXiv 2412.03556): letters inside words
change places, case flips, characters move by one code point. Compositions are nested wrappings of
evaluation/techniques.py with earlier turns, first words of the answer and some of that noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Final

from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.evaluation.techniques import (
    Technique,
    many_shot,
    past_tense,
    prefills,
    wrappers,
)

__all__ = ["Composition", "augment", "cross", "mutate", "random_composition"]

_SCRAMBLE: Final = 0.6
_FLIP: Final = 0.6
_NOISE: Final = 0.06
"""Chances for a word or a character at full strength, as published."""
_MAX_WRAPPINGS: Final = 3
_NOISES: Final = (0.0, 0.0, 0.25, 0.5)
"""Strengths of noise in a composition; half of them have none."""


def augment(text: str, rng: Random, strength: float) -> str:
    """`text` with its characters disturbed; strength 0 leaves it, 1 is best-of-n's."""
    words = [_scrambled(word, rng, strength) for word in text.split(" ")]
    return "".join(_disturbed(character, rng, strength) for character in " ".join(words))


def _scrambled(word: str, rng: Random, strength: float) -> str:
    if len(word) < 4 or rng.random() >= _SCRAMBLE * strength:
        return word
    middle = list(word[1:-1])
    rng.shuffle(middle)
    return word[0] + "".join(middle) + word[-1]


def _disturbed(character: str, rng: Random, strength: float) -> str:
    if character.isalpha() and rng.random() < _FLIP * strength:
        character = character.swapcase()
    if " " < character < "~" and rng.random() < _NOISE * strength:
        # Within printable ASCII: "!" to "~".
        character = chr(min(max(ord(character) + rng.choice((-1, 1)), ord("!")), ord("~")))
    return character


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One way to put any request, as names of techniques."""

    wrappings: tuple[str, ...] = ()
    """The first one is the innermost."""
    earlier: str | None = None
    prefill: str | None = None
    noise: float = 0.0
    noise_seed: int = 0

    def messages(self, request: str) -> tuple[Message, ...]:
        """The conversation that is sent; with a prefill it ends with the assistant's turn."""
        known = _techniques()
        text = augment(request, Random(self.noise_seed), self.noise)  # noqa: S311 - no secret
        for name in self.wrappings:
            text = known["wrapping"][name].wrap(text)
        earlier = known["earlier"][self.earlier].earlier if self.earlier else ()
        first_words = known["prefill"][self.prefill].prefill if self.prefill else ""
        answer = (Message("assistant", first_words),) if first_words else ()
        return (*earlier, Message("user", text), *answer)

    def shorter(self) -> Composition | None:
        """The same without its longest part; None if nothing is left to drop."""
        if self.earlier:
            return replace(self, earlier=None)
        if self.wrappings:
            return replace(self, wrappings=self.wrappings[:-1])
        return None


@cache
def _techniques() -> Mapping[str, Mapping[str, Technique]]:
    kinds = {
        "wrapping": [*wrappers(), *past_tense()],
        "earlier": many_shot(),
        "prefill": prefills(),
    }
    return {kind: {t.name: t for t in techniques} for kind, techniques in kinds.items()}


def random_composition(rng: Random) -> Composition:
    """One or two wrappings, and in half of all cases earlier turns or first words."""
    known = _techniques()
    return Composition(
        wrappings=tuple(rng.sample(list(known["wrapping"]), rng.randint(1, 2))),
        earlier=_perhaps(known["earlier"], rng),
        prefill=_perhaps(known["prefill"], rng),
        noise=rng.choice(_NOISES),
        noise_seed=rng.getrandbits(32),
    )


def mutate(parent: Composition, rng: Random) -> Composition:
    """`parent` with one gene changed."""
    known = _techniques()
    gene = rng.choice(("add", "drop", "swap", "earlier", "prefill", "noise"))
    if gene == "earlier":
        return replace(parent, earlier=_perhaps(known["earlier"], rng))
    if gene == "prefill":
        return replace(parent, prefill=_perhaps(known["prefill"], rng))
    if gene == "noise":
        return replace(parent, noise=rng.choice(_NOISES), noise_seed=rng.getrandbits(32))
    wrappings = list(parent.wrappings)
    new = rng.choice([name for name in known["wrapping"] if name not in wrappings])
    if not wrappings or (gene == "add" and len(wrappings) < _MAX_WRAPPINGS):
        wrappings.insert(rng.randint(0, len(wrappings)), new)
    elif gene == "drop":
        del wrappings[rng.randrange(len(wrappings))]
    else:
        wrappings[rng.randrange(len(wrappings))] = new
    return replace(parent, wrappings=tuple(wrappings))


def cross(one: Composition, other: Composition, rng: Random) -> Composition:
    """A child that has each gene of one of its parents; wrappings are cut and joined."""
    inner = one.wrappings[: rng.randint(0, len(one.wrappings))]
    outer = other.wrappings[rng.randint(0, len(other.wrappings)) :]
    noisy = rng.choice((one, other))
    return Composition(
        wrappings=tuple(dict.fromkeys((*inner, *outer)))[:_MAX_WRAPPINGS],
        earlier=rng.choice((one, other)).earlier,
        prefill=rng.choice((one, other)).prefill,
        noise=noisy.noise,
        noise_seed=noisy.noise_seed,
    )


def _perhaps(known: Mapping[str, Technique], rng: Random) -> str | None:
    return rng.choice(list(known)) if rng.random() < 0.5 else None
