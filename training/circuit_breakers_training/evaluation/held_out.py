"""Whether a breaker has seen the prompts that it is evaluated on.

Training stores digests of the prompts of every split in the artifact. Prompts of train, selection
and calibration are refused: the adapter, the probe or its threshold were made for them. Where the
very dataset is at hand, so are prompts that use nearly the words of those. Prompts of its own test
split are not compared in that way: they were kept apart by groups, and what is alike in different
groups was meant to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from circuit_breakers.artifact import Breaker
from circuit_breakers.errors import ArtifactError, DataError
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.data.overlap import (
    nearly_overlapping,
    overlapping,
    prompt_digests,
    user_turns,
)
from circuit_breakers_training.data.split import SPLITS

__all__ = ["DIGESTS_FILE", "Overlap", "check_held_out", "digests_file", "read_digests"]

DIGESTS_FILE: Final = "prompt_digests.json"
"""Extra file of an artifact: {split: [digest, ...]}."""

Overlap = Literal["none", "unknown"]

_SEEN: Final = SPLITS[:-1]
_SHOWN = 3
_SHOWN_CHARACTERS = 60


def digests_file(dataset: Dataset) -> bytes:
    """Content of DIGESTS_FILE for a breaker that is made from `dataset`."""
    digests = {name: list(prompt_digests(getattr(dataset, name))) for name in SPLITS}
    return (json.dumps(digests, indent=2) + "\n").encode()


def read_digests(breaker: Breaker, dataset: Dataset | None) -> Mapping[str, Sequence[str]] | None:
    """Digests of the prompts that `breaker` was made from, by split; None if nobody knows.

    A breaker without the file is known all the same if `dataset` is byte for byte the one that its
    manifest names.

    Raises:
        ArtifactError: the file is not laid out as expected.
    """
    if DIGESTS_FILE in breaker.manifest.files:
        path = breaker.path / DIGESTS_FILE
        digests = json.loads(path.read_bytes())
        if not isinstance(digests, dict) or set(digests) != set(SPLITS):
            raise ArtifactError(
                f"{path}: got other keys, expected {', '.join(SPLITS)}; train it again"
            )
        return digests
    if dataset is not None and _is_source(dataset, breaker):
        return {name: prompt_digests(getattr(dataset, name)) for name in SPLITS}
    return None


def check_held_out(
    breaker: Breaker,
    dataset: Dataset | None,
    requests: Mapping[str, Sequence[str]],
    *,
    allow_unknown: bool,
) -> Overlap:
    """What can be said: "none", or "unknown" if that is allowed.

    Args:
        requests: by suite, without any technique's wrapping.
    Raises:
        DataError: requests were seen in training, or nobody knows and that is not allowed.
    """
    digests = read_digests(breaker, dataset)
    if digests is None:
        if allow_unknown:
            return "unknown"
        raise DataError(
            f"breaker {breaker.manifest.name!r} has no {DIGESTS_FILE}: whether it was trained on "
            "the prompts of these suites is unknown, expected a breaker that says so; train it "
            "again, give the dataset that it was trained on with --data, or pass "
            "--allow-unknown-overlap, which the report will say"
        )
    prompts = list(dict.fromkeys(prompt for own in requests.values() for prompt in own))
    seen = {split: set(overlapping(digests[split], prompts)) for split in _SEEN}
    holds = "holds"
    if dataset is not None and _is_source(dataset, breaker):
        held_out = set(overlapping(digests["test"], prompts))
        others = [prompt for prompt in prompts if prompt not in held_out]
        for split in _SEEN:
            seen[split].update(nearly_overlapping(user_turns(getattr(dataset, split)), others))
        holds = "holds, in these words or nearly"
    found = [
        f"suite {suite!r}: got {len(same)} of {len(set(own))} prompts that the breaker's {split} "
        f"split {holds} ({_shown(same)})"
        for suite, own in requests.items()
        for split in _SEEN
        if (same := [prompt for prompt in dict.fromkeys(own) if prompt in seen[split]])
    ]
    if found:
        raise DataError(
            f"{'; '.join(found)}; expected none; remove them, or train a breaker without them"
        )
    return "none"


def _is_source(dataset: Dataset, breaker: Breaker) -> bool:
    """Whether it is, byte for byte, the one that the breaker was made from."""
    return dataset.digests == breaker.manifest.data_sha256


def _shown(prompts: Sequence[str]) -> str:
    few = [" ".join(prompt.split()) for prompt in prompts[:_SHOWN]]
    texts = [repr(t if len(t) <= _SHOWN_CHARACTERS else t[:_SHOWN_CHARACTERS] + "…") for t in few]
    return ", ".join(texts) + (", ..." if len(prompts) > _SHOWN else "")
