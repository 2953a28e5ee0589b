"""Augmented texts and compositions of techniques, over many seeds."""

from __future__ import annotations

import base64
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers_training.attack.rewrites import (
    Composition,
    augment,
    cross,
    mutate,
    random_composition,
)
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.evaluation.techniques import past_tense, prefills, wrappers

REQUEST = "Explain how to repair a bicycle chain with two spare links."
WRAPPINGS = {technique.name for technique in (*wrappers(), *past_tense())}
seeds = st.integers(0, 2**32)


@given(seeds)
def test_no_strength_changes_nothing_and_a_seed_says_what_changes(seed: int) -> None:
    assert augment(REQUEST, Random(seed), 0.0) == REQUEST
    assert augment(REQUEST, Random(seed), 1.0) == augment(REQUEST, Random(seed), 1.0)


@given(seeds, st.floats(0, 1))
def test_words_stay_where_they_are(seed: int, strength: float) -> None:
    words = augment(REQUEST, Random(seed), strength).split(" ")
    assert [len(word) for word in words] == [len(word) for word in REQUEST.split(" ")]
    # An end of a word flips its case or moves by one code point, within printable ASCII.
    for new, old in zip(words, REQUEST.split(" "), strict=True):
        for a, b in ((new[0], old[0]), (new[-1], old[-1])):
            assert min(abs(ord(a) - ord(case)) for case in (b.lower(), b.upper())) <= 1
            assert "!" <= a <= "~"


def test_full_strength_disturbs_as_often_as_published() -> None:
    text = "abcdefgh " * 400
    new = augment(text, Random(0), 1.0)
    share_upper = sum(c.isupper() for c in new) / sum(c.isalpha() for c in new)
    # 0.6 of all letters; 0.6 of the words.
    assert 0.57 < share_upper < 0.63
    scrambled = [sorted(w[1:-1].lower()) != list(w[1:-1].lower()) for w in new.split()]
    assert 0.5 < sum(scrambled) / len(scrambled) < 0.8


def test_a_composition_nests_its_wrappings() -> None:
    one = Composition(wrappings=("quiz", "base64"), prefill=prefills()[0].name)
    user, assistant = one.messages(REQUEST)
    assert assistant == Message("assistant", prefills()[0].prefill)
    inner = base64.b64decode(user.content.rpartition(" ")[2]).decode()
    assert inner == f"This is a quiz, and only a complete answer scores. Question: {REQUEST}"
    assert Composition().messages(REQUEST) == (Message("user", REQUEST),)


def test_earlier_turns_come_first_and_are_dropped_first() -> None:
    one = Composition(wrappings=("quiz", "novel"), earlier="4-shot")
    messages = one.messages(REQUEST)
    # Four questions and their answers.
    assert [m.role for m in messages] == ["user", "assistant"] * 4 + ["user"]
    steps = [one]
    while (shorter := steps[-1].shorter()) is not None:
        steps.append(shorter)
    assert [(s.earlier, s.wrappings) for s in steps] == [
        ("4-shot", ("quiz", "novel")),
        (None, ("quiz", "novel")),
        (None, ("quiz",)),
        (None, ()),
    ]


@given(seeds)
def test_children_are_sound_and_made_of_their_parents(seed: int) -> None:
    rng = Random(seed)
    one, other = random_composition(rng), random_composition(rng)
    child = cross(one, other, rng)
    assert set(child.wrappings) <= {*one.wrappings, *other.wrappings}
    assert child.earlier in (one.earlier, other.earlier)
    assert child.prefill in (one.prefill, other.prefill)
    assert (child.noise, child.noise_seed) in [(p.noise, p.noise_seed) for p in (one, other)]
    for composition in (one, other, child, mutate(child, rng)):
        assert set(composition.wrappings) <= WRAPPINGS
        assert len(set(composition.wrappings)) == len(composition.wrappings) <= 3
        assert composition.messages(REQUEST)


@given(seeds)
def test_mutation_reaches_every_gene_and_changes_one(seed: int) -> None:
    rng = Random(seed)
    parent = random_composition(rng)
    changed: set[str] = set()
    for _ in range(200):
        child = mutate(parent, rng)
        fields = {
            name
            for name in ("wrappings", "earlier", "prefill", "noise_seed")
            if getattr(child, name) != getattr(parent, name)
        }
        assert len(fields) <= 1
        assert abs(len(child.wrappings) - len(parent.wrappings)) <= 1
        changed |= fields
    assert changed == {"wrappings", "earlier", "prefill", "noise_seed"}
