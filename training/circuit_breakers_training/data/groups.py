"""Near duplicates by word overlap, so that a paraphrase never sits in another split."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

__all__ = [
    "content_stems",
    "content_words",
    "drop_near_duplicates",
    "merge_near_duplicates",
    "near_duplicates",
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

    named: dict[frozenset[str], str] = {}
    for text, group in zip(texts, groups, strict=True):
        if words := content_words(text):
            first, second = sorted((root(named.setdefault(words, group)), root(group)))
            parent[second] = first
    owners = list(named.values())
    for i, j in _near_pairs(list(named)):
        first, second = sorted((root(owners[i]), root(owners[j])))
        parent[second] = first
    return [root(group) for group in groups]


def near_duplicates(texts: Sequence[str], *, of: Sequence[str]) -> list[str]:
    """Those of `texts` whose content words are too close to one of the texts `of`, in order."""
    words = [content_words(text) for text in (*of, *texts)]
    near = {j for i, j in _near_pairs(words, num_known=len(of))}
    return [text for j, text in enumerate(texts, start=len(of)) if j in near]


def _near_pairs(
    sets: Sequence[frozenset[str]], *, num_known: int | None = None
) -> Iterator[tuple[int, int]]:
    """Indices i < j of sets whose Jaccard index is NEAR_DUPLICATE or more.

    Prefix filtering of Bayardo et al. (WWW 2007, "Scaling up all pairs similarity search"), exact:
    with words sorted from rare to common, two sets this close share one of their first
    n - ceil(t n) + 1 words, so that only those are looked up.

    Args:
        num_known: the first sets, which are paired with the others and not among each other.
    """
    counts = Counter(word for words in sets for word in words)
    by_word: dict[str, list[int]] = {}
    for j, words in enumerate(sets):
        # The subtraction keeps 0.6 * 35, which is 21.000000000000004, from being rounded up.
        needed = math.ceil(NEAR_DUPLICATE * len(words) - 1e-9)
        prefix = sorted(words, key=lambda word: (counts[word], word))[: len(words) - needed + 1]
        if num_known is None or j >= num_known:
            for i in {i for word in prefix for i in by_word.get(word, ())}:
                # Sets of sizes this different are never close, and sizes are quicker to compare.
                low, high = sorted((len(sets[i]), len(words)))
                if low >= NEAR_DUPLICATE * high - 1e-9 and (
                    word_jaccard(sets[i], words) >= NEAR_DUPLICATE
                ):
                    yield i, j
        if num_known is None or j < num_known:
            for word in prefix:
                by_word.setdefault(word, []).append(j)
