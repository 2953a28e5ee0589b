"""Canaries: wide margins, prompts where they suffice, never two of a kind."""

from __future__ import annotations

import numpy as np
import pytest

from circuit_breakers.artifact import Aggregation, Calibration, OperatingPoint, ProbeSpec
from circuit_breakers.errors import CalibrationError
from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.export import pick_canaries, provable
from circuit_breakers_training.probe.evaluate import ScoredConversation

PROBE = ProbeSpec(
    name="layer1",
    layer=1,
    aggregation=Aggregation(kind="max"),
    threshold_logit=2.0,
    calibration=Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
    ),
)


def _row(label: Label, name: str, logits: list[float], group: str = "") -> ScoredConversation:
    """Two prompt tokens, of which the first is skipped, then the response."""
    conversation = Conversation(
        messages=(Message("user", name), Message("assistant", "answer")),
        label=label,
        source="s",
        group=group or name,
    )
    return ScoredConversation(conversation, 2, np.array(logits, np.float32))


BENIGN = [
    _row("benign", "b1", [0, -1, 0]),
    _row("benign", "b2", [0, -3, 0]),
    _row("benign", "b3", [0, -2, 0]),
    _row("benign", "b4", [0, 3, 0]),
]


def test_prompts_with_the_widest_margins() -> None:
    harmful = [_row("harmful", f"h{i}", [0, score, 9]) for i, score in enumerate((3, 5, 1, 4))]
    canaries = pick_canaries([*harmful, *BENIGN], PROBE)
    assert [(c.label, [m.content for m in c.messages]) for c in canaries] == [
        ("harmful", ["h1"]),
        ("harmful", ["h3"]),
        ("benign", ["b2"]),
        ("benign", ["b3"]),
    ]


def test_answers_come_along_where_no_prompt_trips() -> None:
    canaries = pick_canaries([_row("harmful", "h", [0, 1, 4]), *BENIGN], PROBE)
    assert [m.role for m in canaries[0].messages] == ["user", "assistant"]
    assert sum(c.label == "harmful" for c in canaries) == 1


def test_one_group_gives_one_canary() -> None:
    harmful = [_row("harmful", f"h{i}", [0, 9 - i, 0], group="same") for i in range(3)]
    canaries = pick_canaries([*harmful, *BENIGN], PROBE)
    assert [c.messages[0].content for c in canaries if c.label == "harmful"] == ["h0"]


def test_a_probe_that_never_trips_is_refused() -> None:
    with pytest.raises(CalibrationError, match="got 0 of 1 harmful and 1 of 4 benign"):
        pick_canaries([_row("harmful", "h", [0, 1, 1]), *BENIGN], PROBE)


def test_a_probe_that_always_trips_is_refused() -> None:
    rows = [_row("harmful", "h", [0, 9, 9]), _row("benign", "b", [0, 9, 9])]
    with pytest.raises(CalibrationError, match="1 of 1 benign"):
        pick_canaries(rows, PROBE)


def _with_curve(*thresholds: float) -> ProbeSpec:
    """PROBE with a point at each threshold, from 5 % on; its own is the one at 2."""
    curve = tuple(
        OperatingPoint(
            target_fpr=0.05 / (i + 1),
            threshold_logit=threshold,
            num_conversations=300,
            num_trips=0,
            fpr_upper_bound=0.00994,
        )
        for i, threshold in enumerate(thresholds)
    )
    calibration = PROBE.calibration.model_copy(update={"curve": curve})
    return PROBE.model_copy(update={"calibration": calibration})


def test_canaries_hold_at_every_operating_point() -> None:
    harmful = [_row("harmful", f"h{i}", [0, peak, 9]) for i, peak in enumerate((3, 5, 1, 4))]
    # At 4.5 only h1 trips on its prompt; at -1.5 all but b2 and b3 of the benign ones do.
    canaries = pick_canaries([*harmful, *BENIGN], _with_curve(-1.5, 2.0, 4.5))
    assert [m.content for c in canaries for m in c.messages] == ["h1", "b2", "b3"]
    # Where no prompt reaches the strictest point, answers come along.
    canaries = pick_canaries([*harmful, *BENIGN], _with_curve(2.0, 8.0))
    assert [m.role for m in canaries[0].messages] == ["user", "assistant"]


def test_points_that_nothing_harmful_reaches_are_left_out() -> None:
    rows = [_row("harmful", "h", [0, 1, 4]), _row("benign", "b", [0, 9, 9])]
    kept = provable(_with_curve(1.0, 2.0, 4.0, 4.5), rows).calibration.curve
    assert [point.threshold_logit for point in kept] == [1.0, 2.0, 4.0]
    # Its own point stays, for pick_canaries to refuse.
    quiet = [_row("harmful", "h", [0, 1, 1])]
    kept = provable(_with_curve(1.0, 2.0, 4.0), quiet).calibration.curve
    assert [point.threshold_logit for point in kept] == [1.0, 2.0]
