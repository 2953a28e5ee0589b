"""What a breaker carries so that a server can prove its guard live: canaries.

T tokens of one conversation
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from circuit_breakers.artifact import Canary, Message, ProbeSpec
from circuit_breakers.errors import CalibrationError
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.probe.evaluate import ScoredConversation
from circuit_breakers_training.probe.selection import expected_verdict
from circuit_breakers_training.render import ChatMessage

__all__ = ["NUM_CANARIES", "pick_canaries", "provable"]

NUM_CANARIES = 2
"""Of each label; a second one shows that the first did not trip by chance."""


class _Option(NamedTuple):
    peak: float
    conversation: Conversation
    messages: tuple[Message, ...]


def provable(probe: ProbeSpec, rows: Sequence[ScoredConversation]) -> ProbeSpec:
    """The probe without those points of its curve at which no harmful conversation trips.

    A server could not prove its guard live there, and would stop nothing. The probe's own point
    stays; `pick_canaries` refuses a probe for which that is such a one.
    """
    peaks = [
        _whole(row, probe).peak for row in rows if expected_verdict(row.conversation) == "harmful"
    ]
    highest = max([*peaks, probe.threshold_logit])
    curve = tuple(p for p in probe.calibration.curve if p.threshold_logit <= highest)
    calibration = probe.calibration.model_copy(update={"curve": curve})
    return probe.model_copy(update={"calibration": calibration})


def pick_canaries(rows: Sequence[ScoredConversation], probe: ProbeSpec) -> tuple[Canary, ...]:
    """Two harmful conversations that trip by the widest margin, two benign ones far below.

    They hold at every point of the probe's curve, as a server may run at any. Prompts without their
    answer where possible, as these are the quickest to run.

    Args:
        rows: scored under `probe`, of a split that the threshold was not set on.
    Raises:
        CalibrationError: no harmful conversation trips, or every benign one does, so that a server
            could not tell a live guard from a dead one.
    """
    harmful = [row for row in rows if expected_verdict(row.conversation) == "harmful"]
    benign = [row for row in rows if expected_verdict(row.conversation) == "benign"]
    thresholds = [
        probe.threshold_logit,
        *(point.threshold_logit for point in probe.calibration.curve),
    ]
    loud = [o for row in harmful if (o := _prompt(row, probe)).peak >= max(thresholds)]
    if not loud:
        loud = [o for row in harmful if (o := _whole(row, probe)).peak >= max(thresholds)]
    quiet = [o for row in benign if (o := _prompt(row, probe)).peak < min(thresholds)]
    if not loud or not quiet:
        raise CalibrationError(
            f"got {len(loud)} of {len(harmful)} harmful and "
            f"{len(benign) - len(quiet)} of {len(benign)} benign conversations that trip at "
            f"thresholds up to {max(thresholds):.3f}; expected some harmful and not all benign "
            "ones, to prove a server's guard live; add training data or raise target_fpr"
        )
    picked = _first_groups(sorted(loud, key=lambda o: -o.peak))
    picked += _first_groups(sorted(quiet, key=lambda o: o.peak))
    return tuple(Canary(messages=o.messages, label=o.conversation.label) for o in picked)


def _prompt(row: ScoredConversation, probe: ProbeSpec) -> _Option:
    score_T = aggregate(row.logit_T[: row.num_prompt_tokens], probe.aggregation)
    return _Option(
        float(np.max(score_T)), row.conversation, _messages(row.conversation.messages[:-1])
    )


def _whole(row: ScoredConversation, probe: ProbeSpec) -> _Option:
    score_T = aggregate(row.logit_T, probe.aggregation)
    return _Option(float(np.max(score_T)), row.conversation, _messages(row.conversation.messages))


def _messages(messages: Iterable[ChatMessage]) -> tuple[Message, ...]:
    return tuple(Message.model_validate({"role": m.role, "content": m.content}) for m in messages)


def _first_groups(options: Iterable[_Option]) -> list[_Option]:
    """The first options of different groups."""
    by_group: dict[str, _Option] = {}
    for option in options:
        by_group.setdefault(option.conversation.group, option)
    return list(by_group.values())[:NUM_CANARIES]
