"""Long conversations of the tiny language, trips where they were put, and rates by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from circuit_breakers.artifact import Aggregation, Calibration, ProbeSpec
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.probe import long_context
from circuit_breakers_training.probe.evaluate import ScoredConversation
from circuit_breakers_training.probe.long_context import (
    LongConversation,
    evaluate_long,
    extrapolated_rates,
    long_conversations,
)
from circuit_breakers_training.render import Rendered, render

from ..conftest import make_conversations

PROBE = ProbeSpec(
    name="layer1",
    layer=1,
    aggregation=Aggregation(kind="max"),
    threshold_logit=2.0,
    calibration=Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=512
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    return make_conversations("benign", 40, 1) + make_conversations("harmful", 6, 2)


def _harmful_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(f"h{i}") for i in range(30)}


def test_only_the_last_turn_is_harmful(
    tokenizer: Any, rows: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "LONG_TOKENS", 300)
    made = long_conversations(tokenizer, rows, count=4, context=2000)
    assert len({c.harmful for c in made}) == 4
    for harmful, rendered, num_benign in made:
        # A turn of this language has at most 25 tokens.
        assert 275 <= num_benign <= 300
        words = _harmful_ids(tokenizer)
        assert not words & set(rendered.ids[:num_benign])
        alone = render(tokenizer, rows[harmful].messages, max_length=99).ids
        # Nothing but the closing token of the turn before comes in between.
        assert rendered.ids[num_benign + 1 :] == alone
        assert rendered.num_truncated == 0


def test_everything_fits_into_the_context(tokenizer: Any, rows: list[Conversation]) -> None:
    made = long_conversations(tokenizer, rows, count=6, context=112)
    assert len(made) == 6
    assert all(50 < len(c.rendered.ids) < 112 for c in made)
    # A context that holds no second turn gives none.
    assert long_conversations(tokenizer, rows, count=6, context=30) == []


def test_choice_depends_on_the_seed_alone(tokenizer: Any, rows: list[Conversation]) -> None:
    first = long_conversations(tokenizer, rows, count=3, context=112, seed=1)
    assert long_conversations(tokenizer, rows, count=3, context=112, seed=1) == first
    assert long_conversations(tokenizer, rows, count=3, context=112, seed=2) != first


def test_none_are_made_where_there_is_nothing_to_make_them_of(
    tokenizer: Any, rows: list[Conversation]
) -> None:
    assert long_conversations(tokenizer, rows, count=0, context=112) == []
    assert long_conversations(tokenizer, rows[:40], count=3, context=112) == []
    assert long_conversations(tokenizer, rows[40:], count=3, context=112) == []
    empty = evaluate_long([], [], [], PROBE)
    assert empty["harmful_turn"]["num"] == 0
    json.dumps(empty, allow_nan=False)


def _scored(label: Any, logits: list[float]) -> ScoredConversation:
    conversation = Conversation(
        messages=(Message("user", "q"), Message("assistant", "a")),
        label=label,
        source="s",
        group="g",
    )
    return ScoredConversation(conversation, 2, np.array(logits, np.float32))


def test_trips_before_and_in_the_harmful_turn() -> None:
    rows = [_scored("harmful", [0, 3]), _scored("harmful", [0, 1])]
    long = [
        LongConversation(harmful, Rendered(ids=(0,) * 6, num_prompt_tokens=5), 4)
        for harmful in (0, 0, 1, 1)
    ]
    logits = [
        np.array(logit_T, np.float32)
        for logit_T in (
            [9, 0, 0, 0, 0, 3],  # position 0 is skipped; in the harmful turn
            [0, 0, 0, 3, 0, 3],  # stopped at the last benign token
            [0, 0, 0, 0, 0, 0],  # never
            [0, 0, 0, 0, 2, 0],  # on the harmful request
        )
    ]
    result = evaluate_long(long, logits, rows, PROBE)
    assert result["num_benign_tokens"] == {"min": 4, "max": 4, "sum": 16}
    assert (result["benign_run"]["num_trips"], result["benign_run"]["num"]) == (1, 4)
    assert (result["harmful_turn"]["num_trips"], result["harmful_turn"]["num"]) == (2, 3)
    assert (result["harmful_alone"]["num_trips"], result["harmful_alone"]["num"]) == (2, 4)


def test_extrapolation_is_the_exponential_of_the_hazard() -> None:
    rows = [_scored("benign", [0.0] * 100) for _ in range(9)]
    rows += [_scored("benign", [0.0] * 99 + [5.0] + [0.0] * 400)]  # trips at the 100th token
    rows += [_scored("harmful", [5.0] * 50)]  # does not count
    result = extrapolated_rates(rows, PROBE)
    assert result["extrapolated"] is True
    assert (result["num_trips"], result["num_tokens"]) == (1, 1000)
    assert result["hazard"] == 1 / 1000
    # Exact 95 % upper bound of a Poisson mean after one event: 4.744 (Garwood 1936).
    assert result["hazard_upper_bound"] == pytest.approx(4.744e-3, rel=1e-3)
    # Only lengths beyond the calibrated 512 tokens are extrapolated.
    assert list(result["rate_at_tokens"]) == ["1024", "4096", "16384"]
    assert result["rate_at_tokens"]["1024"]["rate"] == pytest.approx(1 - math.exp(-1.024))
    assert result["rate_at_tokens"]["4096"]["upper_bound"] == pytest.approx(1, abs=1e-6)


def test_no_trip_still_has_an_upper_bound() -> None:
    result = extrapolated_rates([_scored("benign", [0.0] * 1000)], PROBE)
    assert result["hazard"] == 0
    # -ln(0.05), the rule of three.
    assert result["hazard_upper_bound"] == pytest.approx(2.9957e-3, rel=1e-3)
