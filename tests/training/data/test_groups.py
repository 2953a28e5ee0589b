from circuit_breakers_training.data.groups import (
    content_stems,
    content_words,
    drop_near_duplicates,
    merge_near_duplicates,
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
