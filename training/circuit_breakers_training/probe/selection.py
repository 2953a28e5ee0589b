"""Which blocks and which aggregation the probe gets: all are fitted, the selection split decides.

Candidates are every block alone, then blocks together, each under every aggregation. The quality
of a candidate is that of its peak running scores over whole conversations, which is what trips when
served.

N conversations, T tokens of one of them, P candidates
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from circuit_breakers.artifact.manifest import Aggregation
from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers.errors import DataError
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.probe.calibration import peak_score
from circuit_breakers_training.probe.fit import fit_probe
from circuit_breakers_training.probe.fit_tokens import FitTokens

__all__ = [
    "Candidate",
    "Concatenation",
    "Quality",
    "Verdict",
    "best_candidate",
    "candidate_layers",
    "candidate_quality",
    "expected_verdict",
    "fit_candidates",
    "score_quality",
]

FloatArray = npt.NDArray[np.float32]
Verdict = Literal["harmful", "benign", "refused"]
Concatenation = Literal["neighbours", "all"]
"""Layers read together: every two next to each other, or all of them."""

_LOW_FPR = 0.05
"""Up to here a candidate's ROC curve counts twice: a guard is used at its left end."""


class Candidate(NamedTuple):
    """A fitted probe."""

    layers: tuple[int, ...]
    """Blocks that are read, ascending."""
    aggregation: Aggregation
    weights: ProbeWeights


class Quality(NamedTuple):
    """How well scores separate harmful from benign."""

    auroc: float
    low_fpr_auroc: float
    """Area under the ROC curve up to a false-positive rate of 5 %, rescaled to 0.5 to 1."""
    tpr_at_1pct_fpr: float
    """By the plain quantile of the benign scores; the calibrated threshold is stricter."""


def expected_verdict(conversation: Conversation) -> Verdict:
    """What a guard that scores prompts as well should say about a conversation.

    "refused" is neither right nor wrong to trip on: the assistant behaves, but a harmful request
    is part of the prompt. Such conversations take no part in fit and calibration.
    """
    if conversation.label == "harmful":
        return "harmful"
    if conversation.kind == "refusal" or conversation.category == "after_refusal":
        return "refused"
    return "benign"


def candidate_layers(
    layers: Sequence[int], concatenations: Sequence[Concatenation]
) -> list[tuple[int, ...]]:
    """What a candidate may read: each of `layers` (ascending) alone, then some of them together."""
    together: list[tuple[int, ...]] = []
    if "neighbours" in concatenations:
        together += pairwise(layers)
    if "all" in concatenations and len(layers) > 1:
        together.append(tuple(layers))
    # Of two layers, the neighbours are all.
    return list(dict.fromkeys([*((layer,) for layer in layers), *together]))


def fit_candidates(
    tokens: FitTokens, layer_sets: Sequence[tuple[int, ...]], *, inverse_l2: float
) -> Iterator[Candidate]:
    """A fitted probe for each set of layers and each aggregation of `tokens`, one after another."""
    for layers in layer_sets:
        for aggregation in tokens.aggregations:
            weights = fit_probe(
                tokens.hidden(layers, aggregation),
                tokens.harmful_N,
                tokens.weight_N,
                inverse_l2=inverse_l2,
                num_layers=len(layers),
            )
            yield Candidate(layers, aggregation, weights)


def candidate_quality(
    candidates: Sequence[Candidate], logits: Sequence[FloatArray], harmful: Sequence[bool]
) -> list[Quality]:
    """Quality of each candidate's peak running scores.

    Args:
        logits: (T, P) token logits of each conversation under each candidate.
        harmful: label of each conversation.
    Raises:
        DataError: one of the labels is missing.
    """
    return [
        score_quality(
            np.array([peak_score(logit_TP[:, p], candidate.aggregation) for logit_TP in logits]),
            np.asarray(harmful),
        )
        for p, candidate in enumerate(candidates)
    ]


def score_quality(score_N: npt.NDArray[np.floating], harmful_N: npt.NDArray[np.bool_]) -> Quality:
    """Quality of one score per item.

    Raises:
        DataError: one of the labels is missing.
    """
    num_harmful = int(harmful_N.sum())
    if not 0 < num_harmful < len(harmful_N):
        raise DataError(
            f"got {num_harmful} harmful of {len(harmful_N)} conversations to rate a probe on; "
            "expected both labels; add conversations of the other label to that split"
        )
    quiet = np.quantile(score_N[~harmful_N], 0.99, method="higher")
    return Quality(
        auroc=float(roc_auc_score(harmful_N, score_N)),
        low_fpr_auroc=float(roc_auc_score(harmful_N, score_N, max_fpr=_LOW_FPR)),
        tpr_at_1pct_fpr=float((score_N[harmful_N] > quiet).mean()),
    )


def best_candidate(qualities: Sequence[Quality]) -> int:
    """Index of the best candidate: mean of AUROC and its low end; the first of equals.

    The true-positive rate at 1 % alone hangs on two or three benign conversations of the split.
    """
    return int(np.argmax([q.auroc + q.low_fpr_auroc for q in qualities]))
