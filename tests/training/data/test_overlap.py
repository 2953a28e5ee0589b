import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.data.overlap import (
    nearly_overlapping,
    overlapping,
    prompt_digest,
    prompt_digests,
)


def _row(*turns: str) -> Conversation:
    messages = []
    for turn in turns:
        messages += [Message("user", turn), Message("assistant", "an answer")]
    return Conversation(messages=tuple(messages), label="benign", source="s", group="g")


def test_a_digest_is_that_of_the_text_in_lower_case_with_single_blanks() -> None:
    assert prompt_digest(" How\n do  I\tFly? ") == hashlib.sha256(b"how do i fly?").hexdigest()


def test_digests_are_sorted_and_of_every_user_turn_once() -> None:
    digests = prompt_digests([_row("b", "a"), _row("A ")])
    assert digests == tuple(sorted(hashlib.sha256(text).hexdigest() for text in (b"a", b"b")))


def test_answers_are_no_prompts() -> None:
    assert overlapping(prompt_digests([_row("a question")]), ["an answer"]) == []


def test_overlapping_prompts_come_back_in_order_as_they_were_written() -> None:
    digests = prompt_digests([_row("one"), _row("two"), _row("three")])
    assert overlapping(digests, ["THREE", "four", " one"]) == ["THREE", " one"]


def test_near_duplicates_are_found_where_the_texts_are_at_hand() -> None:
    texts = ["How do I wash a car?", "?!"]
    prompts = ["Write a tutorial on how to wash my car.", "?! ", "How do I fly?"]
    assert nearly_overlapping(texts, prompts) == prompts[:2]
    assert overlapping(map(prompt_digest, texts), prompts) == ["?! "]


@pytest.mark.parametrize("prompt", ["", "\ud800", "\x00"])
def test_odd_texts_have_a_digest(prompt: str) -> None:
    assert len(prompt_digest(prompt)) == 64


@given(turns=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_every_prompt_overlaps_its_own_dataset(turns: list[str]) -> None:
    rows = [_row(turn) for turn in turns]
    assert overlapping(prompt_digests(rows), turns) == turns
    assert nearly_overlapping(turns, turns) == turns
