"""Rates and trip positions on conversations whose logits are written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from circuit_breakers.artifact.manifest import (
    Aggregation,
    Calibration,
    OperatingPoint,
    ProbeSpec,
)
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message
from circuit_breakers_training.probe.calibration import fpr_upper_bound
from circuit_breakers_training.probe.evaluate import (
    ScoredConversation,
    completion_scores,
    evaluate_probe,
    first_trip,
    roc_points,
    trips_of_groups,
)

CALIBRATION = Calibration(
    target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
)
PROBE = ProbeSpec(
    name="layer1",
    layer=1,
    aggregation=Aggregation(kind="max"),
    threshold_logit=2.0,
    calibration=CALIBRATION,
)


def _row(
    label: Label,
    logits: list[float],
    *,
    num_prompt_tokens: int = 3,
    source: str = "s",
    category: str | None = None,
    kind: Kind = "completion",
    group: str = "g",
) -> ScoredConversation:
    messages = (Message("user", "q"), Message("assistant", "a"))
    conversation = Conversation(
        messages=messages, label=label, source=source, category=category, group=group, kind=kind
    )
    return ScoredConversation(conversation, num_prompt_tokens, np.array(logits, np.float32))


def test_first_trip_is_the_first_score_at_the_threshold_or_nan() -> None:
    assert first_trip(np.array([-np.inf, 1, 2, 3], np.float32), 2.0) == 2
    assert first_trip(np.array([-np.inf, 1, np.nan, 3], np.float32), 9.0) == 2
    assert first_trip(np.array([1, 1.9], np.float32), 2.0) is None


def test_response_is_scored_as_if_the_prompt_were_not() -> None:
    row = _row("harmful", [9, 9, 9, 1, 3])
    assert completion_scores(row, Aggregation(kind="max")).tolist() == [1, 3]
    pairs = Aggregation(kind="rolling_mean", window=2, skip_tokens=2)
    assert completion_scores(row, pairs).tolist() == [1, 2]


ROWS = [
    _row("harmful", [9, 0, 3, 0, 0], source="a", category="x"),  # trips on the prompt
    _row("harmful", [9, 0, 0, 3, 0], source="a", category="y"),  # on the first response token
    _row("harmful", [9, 0, 0, *[0] * 30, 3], source="b", category="y"),  # on the 31st
    _row("harmful", [9, 0, 0, 1, 1], source="b", category="y"),  # never
    _row("benign", [9, 0, 0, 0, 0], source="topic"),
    _row("benign", [9, 0, 0, 0, 2], source="twin"),  # a score equal to the threshold trips
    _row("benign", [9, 5, 0, 0], source="refusal", kind="refusal"),  # not counted
]


def test_rates_at_the_threshold() -> None:
    result = evaluate_probe(ROWS, PROBE)
    assert result["num_harmful"] == 4
    assert result["num_benign"] == 2
    rates = result["at_threshold"]
    assert rates["harmful"]["share"] == 3 / 4
    assert rates["benign"] == {
        "num": 2,
        "num_trips": 1,
        "share": 0.5,
        "upper_bound": fpr_upper_bound(1, 2),
    }
    assert rates["refused"]["share"] == 1.0
    assert {name: r["num_trips"] for name, r in result["benign_by_source"].items()} == {
        "topic": 0,
        "twin": 1,
    }
    assert {name: r["share"] for name, r in result["harmful_by_category"].items()} == {
        "x": 1.0,
        "y": 2 / 3,
    }


def test_groups_of_which_all_or_none_trip_are_counted() -> None:
    trips, silent = [9.0, 0, 0, 3], [9.0, 0, 0, 1]
    groups = {"all": [trips, trips], "some": [trips, silent], "none": [silent] * 3}
    rows = [_row("harmful", x, group=g) for g, of in groups.items() for x in of]
    assert evaluate_probe([*rows, *ROWS[4:6]], PROBE)["harmful_groups"] == {
        "num": 3,
        "num_all_trip": 1,
        "num_none_trips": 1,
        "num_conversations_of_none": 3,
    }


def test_early_shares_leave_the_prompt_out() -> None:
    early = evaluate_probe(ROWS, PROBE)["early"]
    assert early == {
        "prompt": 1 / 4,
        "response_within_16": 1 / 4,
        "response_within_64": 2 / 4,
        "response": 2 / 4,
    }


def test_rates_by_category_and_length() -> None:
    result = evaluate_probe(ROWS, PROBE)
    assert {name: r["num"] for name, r in result["benign_by_category"].items()} == {"none": 2}
    # All of ROWS are shorter than 64 tokens.
    assert {name: r["num_trips"] for name, r in result["harmful_by_length"].items()} == {"0-63": 3}
    rows = [_row("benign", [9, *[0] * (n - 2), 3], source="s") for n in (9000, 64, 63, 127, 128)]
    result = evaluate_probe([*ROWS, *rows], PROBE)
    assert [(name, r["num"]) for name, r in result["benign_by_length"].items()] == [
        ("0-63", 3),
        ("64-127", 2),
        ("128-255", 1),
        ("4096 or more", 1),
    ]


def test_tokens_until_the_trip_count_what_was_generated() -> None:
    until = evaluate_probe(ROWS, PROBE)["tokens_until_trip"]
    # Trips on the prompt, on the first response token, and on the 31st; one never trips.
    assert until == {
        "num": 4,
        "num_trips": 3,
        "median": 1.0,
        "p90": 31.0,
        "share_within_16": 2 / 4,
        "tokens": [0, 1, 31],
    }
    quiet = PROBE.model_copy(update={"threshold_logit": 99.0})
    until = evaluate_probe(ROWS, quiet)["tokens_until_trip"]
    assert (until["num_trips"], until["median"], until["p90"]) == (0, None, None)


def test_rates_at_every_stored_promise() -> None:
    curve = tuple(
        OperatingPoint(
            target_fpr=target_fpr,
            threshold_logit=threshold,
            num_conversations=300,
            num_trips=0,
            fpr_upper_bound=0.00994,
        )
        for target_fpr, threshold in ((0.05, 1.0), (0.01, 2.0), (0.0099999, 2.5))
    )
    probe = PROBE.model_copy(
        update={"calibration": CALIBRATION.model_copy(update={"curve": curve})}
    )
    points = evaluate_probe(ROWS, probe)["operating_points"]
    # Peaks: harmful 3, 3, 3, 1, benign 0, 2.
    assert [
        (p["target_fpr"], p["harmful"]["num_trips"], p["benign"]["num_trips"]) for p in points
    ] == [
        (0.05, 4, 1),
        (0.01, 3, 1),
        (0.0099999, 3, 0),
    ]
    json.dumps(points, allow_nan=False)
    assert evaluate_probe(ROWS, PROBE)["operating_points"] == []


def test_position_zero_never_counts() -> None:
    # Peaks from position 1 on: harmful 3, 3, 3, 1, benign 0, 2. Of 8 pairs, (1, 2) is wrong.
    assert evaluate_probe(ROWS, PROBE)["conversation"]["auroc"] == pytest.approx(7 / 8)


def test_result_is_plain_json() -> None:
    result = evaluate_probe(ROWS, PROBE)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_roc_runs_from_corner_to_corner() -> None:
    false_positive, true_positive = roc_points(ROWS, PROBE)
    assert (false_positive[0], true_positive[0]) == (0, 0)
    assert (false_positive[-1], true_positive[-1]) == (1, 1)


def test_a_group_trips_once_if_any_of_its_conversations_does() -> None:
    logits = {"a": ([9, 2], [9, 3], [9, 0]), "b": ([9, 0], [9, 1]), "c": ([9, 1.9],)}
    rows = [_row("benign", x, group=group) for group, several in logits.items() for x in several]
    # The first token is not scored; a score equal to the threshold trips.
    assert trips_of_groups(rows, PROBE) == {
        "num": 3,
        "num_trips": 1,
        # scipy's beta(2, 2) at 95 %: 3 x^2 - 2 x^3 = 0.95.
        "upper_bound": pytest.approx(0.8646, abs=1e-4),
    }
    loose = CALIBRATION.model_copy(update={"confidence": 0.5})
    halves = trips_of_groups(rows, PROBE.model_copy(update={"calibration": loose}))
    assert halves["upper_bound"] == pytest.approx(0.5)
