"""Whether prompts of an evaluation are among those that a breaker was trained on.

A dataset is known by digests of its prompts, which name none of them, so that they can travel with
a breaker: a suite that overlaps is refused without the training data at hand. Where the texts are
at hand, near duplicates are found too.
"""

import hashlib
from collections.abc import Iterable, Sequence

from circuit_breakers_training.data.groups import near_duplicates
from circuit_breakers_training.data.jsonl import Conversation

__all__ = ["nearly_overlapping", "overlapping", "prompt_digest", "prompt_digests", "user_turns"]


def prompt_digest(prompt: str) -> str:
    """sha256 of a prompt in lower case with single blanks, as 64 hex digits."""
    normalised = " ".join(prompt.lower().split())
    return hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).hexdigest()


def user_turns(rows: Iterable[Conversation]) -> list[str]:
    """All user turns of `rows`, each once.

    Earlier turns count too: a prompt was trained on wherever it stands in a conversation.
    """
    turns = (m.content for row in rows for m in row.messages if m.role == "user")
    return list(dict.fromkeys(turns))


def prompt_digests(rows: Iterable[Conversation]) -> tuple[str, ...]:
    """Digests of all user turns of `rows`, each once, sorted."""
    return tuple(sorted({prompt_digest(turn) for turn in user_turns(rows)}))


def overlapping(digests: Iterable[str], prompts: Iterable[str]) -> list[str]:
    """Those of `prompts` that are among the digested ones, in order."""
    known = frozenset(digests)
    return [prompt for prompt in prompts if prompt_digest(prompt) in known]


def nearly_overlapping(texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Those of `prompts` that are one of `texts` or use nearly the same words, in order.

    Args:
        texts: prompts that were trained on.
    """
    exact = set(overlapping(map(prompt_digest, texts), prompts))
    near = set(near_duplicates(prompts, of=texts))
    return [prompt for prompt in prompts if prompt in exact or prompt in near]
