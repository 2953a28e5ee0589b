from hypothesis import given
from hypothesis import strategies as st

from circuit_breakers_training.data.groups import (
    NEAR_DUPLICATE,
    content_stems,
    content_words,
    drop_near_duplicates,
    merge_near_duplicates,
    near_duplicates,
    word_jaccard,
)


def test_jaccard_is_shared_over_all_words() -> None:
    assert word_jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert word_jaccard(frozenset(), frozenset()) == 0.0


def test_frame_words_do_not_count() -> None:
    assert content_words("Write a tutorial on how to wash a car.") == {"wash", "car"}
    assert content_words("What is it?") == {"what", "is", "it"}


def test_paraphrases_in_other_frames_share_a_group() -> None:
    texts = ["How do I wash a car?", "Write a tutorial on how to wash my car.", "How do I fly?"]
    assert merge_near_duplicates(texts, ["b", "a", "c"]) == ["a", "a", "c"]


def test_merging_is_transitive_over_groups() -> None:
    texts = ["red lamp shade", "green frog", "green frog pond", "red lamp shade oak"]
    assert merge_near_duplicates(texts, ["a", "a", "b", "c"]) == ["a", "a", "a", "a"]


def test_near_duplicates_are_dropped_in_order() -> None:
    texts = ["How do I wash a car?", "Please wash a car", "bake bread", "sing songs"]
    assert drop_near_duplicates(texts, against=["sing many songs"]) == [texts[0], "bake bread"]


def test_stems_join_forms_of_a_word() -> None:
    assert content_stems("How do I smuggle ox tails?") == {"smugg", "tails"}
    assert content_stems("smuggling") == {"smugg"}


WORDS = [f"w{i}" for i in range(6)]
TEXTS = st.lists(st.lists(st.sampled_from([*WORDS, "?"]), max_size=6).map(" ".join), max_size=8)


def merged_by_comparing_all(texts: list[str]) -> list[str]:
    """The definition: connected components, each called by its smallest name."""
    words = [content_words(text) for text in texts]
    names = [str(i) for i in range(len(texts))]
    for _ in texts:
        for i, a in enumerate(words):
            for j, b in enumerate(words):
                if word_jaccard(a, b) >= NEAR_DUPLICATE:
                    names[i] = names[j] = min(names[i], names[j])
    return names


@given(texts=TEXTS)
def test_looking_up_rare_words_finds_what_comparing_all_finds(texts: list[str]) -> None:
    names = [str(i) for i in range(len(texts))]
    assert merge_near_duplicates(texts, names) == merged_by_comparing_all(texts)


@given(texts=TEXTS, of=TEXTS)
def test_near_duplicates_are_those_close_to_one(texts: list[str], of: list[str]) -> None:
    assert near_duplicates(texts, of=of) == [
        text
        for text in texts
        if any(
            word_jaccard(content_words(text), content_words(other)) >= NEAR_DUPLICATE
            for other in of
        )
    ]


def test_a_boundary_that_floats_round_up_is_kept() -> None:
    # 0.6 * 35 is 21.000000000000004: 21 shared of 35 words are near duplicates all the same.
    words = [f"v{i}" for i in range(35)]
    assert near_duplicates([" ".join(words[:21])], of=[" ".join(words)])
