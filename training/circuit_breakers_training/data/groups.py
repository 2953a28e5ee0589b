"""Near duplicates by word overlap, so that a paraphrase never sits in another split."""

import re
from collections.abc import Sequence
from typing import Final

__all__ = [
    "content_stems",
    "content_words",
    "drop_near_duplicates",
    "merge_near_duplicates",
    "word_jaccard",
]

NEAR_DUPLICATE: Final = 0.6
"""Jaccard index of the words from which two prompts count as one."""

# Words of the request frames and of plain grammar: they say nothing about what is asked for.
_FRAME_WORDS: Final = frozenset(
    """
    a act am an and answer answers any are as assume at avoid be bedtime before begin beginner
    best between by can character checklist common complete could cousin decided describe detail
    detailed dialogue did do does doing draw e every everything exactly exception expert explain
    explains few first five for forum friend friends from game get give given grandmother has
    have he help her hi him his how i if ignore in instructions into is it its let list mail
    main make me miss mistakes money month most much my need next not novel now of on one only
    or order our people person plan planning play please post practical question quick realistic
    rules scene script sentences she short shows so someone spending start step steps story
    summarise takes teach tell that the their them they this tips to tried try tutorial twice
    two up us used video viewers want wants was way ways we were what when where which while who
    will with without work would write writing wrong you your
    """.split()  # noqa: SIM905
)


def content_words(text: str) -> frozenset[str]:
    """Lower-case words of a text without those of request frames; all, if nothing else is left."""
    found = frozenset(re.findall(r"[^\W_]+", text.lower()))
    return found - _FRAME_WORDS or found


def content_stems(text: str) -> frozenset[str]:
    """First five letters of the content words, so that "smuggle" meets "smuggling"."""
    return frozenset(word[:5] for word in content_words(text) if len(word) > 2)


def word_jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared words over all words, 0 to 1; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


def drop_near_duplicates(texts: Sequence[str], *, against: Sequence[str] = ()) -> list[str]:
    """`texts` without those whose content words are too close to an earlier text's.

    Args:
        against: texts that count as earlier ones, such as prompts that are already taken.
    """
    seen = [content_words(text) for text in against]
    kept = []
    for text in texts:
        found = content_words(text)
        if all(word_jaccard(found, other) < NEAR_DUPLICATE for other in seen):
            kept.append(text)
            seen.append(found)
    return kept


def merge_near_duplicates(texts: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Group of each text after groups with near-duplicate texts have become one.

    Two texts are near duplicates if their content words overlap by NEAR_DUPLICATE or more. A merged
    group is called by the smallest of its names, so that the result depends on no order.
    """
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    found = [content_words(text) for text in texts]
    by_word: dict[str, list[int]] = {}
    for i, wanted in enumerate(found):
        candidates = {j for word in wanted for j in by_word.get(word, ())}
        for j in candidates:
            if word_jaccard(wanted, found[j]) >= NEAR_DUPLICATE:
                first, second = sorted((root(groups[i]), root(groups[j])))
                parent[second] = first
        for word in wanted:
            by_word.setdefault(word, []).append(i)
    return [root(group) for group in groups]
