"""Which attempts a suite makes."""

from __future__ import annotations

from collections import Counter

import pytest

from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.data.jsonl import Label, Message
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.suites import (
    DEFAULT_SUITES,
    SUITES,
    build_attempts,
    pick_suites,
)
from circuit_breakers_training.evaluation.techniques import wrappers


def _prompts(label: Label, count: int, *, look_alike: bool = False) -> list[EvalPrompt]:
    return [
        EvalPrompt(
            messages=(Message("user", f"{label} request {i}"),),
            label=label,
            source="s",
            look_alike=look_alike,
        )
        for i in range(count)
    ]


BOTH = _prompts("harmful", 30) + _prompts("benign", 50)


def test_every_request_is_asked_once_and_benign_ones_are_the_control() -> None:
    attempts = build_attempts(["direct"], BOTH, limit=40, per_prompt=1)
    assert Counter(a.prompt.label for a in attempts) == {"harmful": 30, "benign": 40}
    assert len({a.prompt.request for a in attempts}) == 70
    assert all(a.messages[-1].content == a.prompt.request for a in attempts)


def test_techniques_go_round_evenly() -> None:
    attempts = build_attempts(["wrappers"], BOTH, limit=30, per_prompt=1)
    used = Counter(a.technique for a in attempts if a.harmful)
    # 30 requests and 10 wrappers.
    assert set(used.values()) == {3}
    assert set(used) == {t.name for t in wrappers()}


def test_more_techniques_a_request_are_all_different() -> None:
    attempts = build_attempts(["prefill"], BOTH, limit=5, per_prompt=99)
    used = Counter((a.prompt.request, a.technique) for a in attempts)
    assert set(used.values()) == {1}
    assert len(attempts) == 10 * 6  # 5 requests of each label, 6 prefills
    assert all(a.prefill for a in attempts)


def test_attempts_do_not_depend_on_the_order_of_prompts() -> None:
    there = build_attempts(["wrappers"], BOTH, limit=99, per_prompt=1)
    back = build_attempts(["wrappers"], BOTH[::-1], limit=99, per_prompt=1)
    assert there == back


def test_earlier_turns_follow_the_system_turn() -> None:
    prompt = EvalPrompt(
        messages=(Message("system", "s"), Message("user", "q")), label="harmful", source="s"
    )
    (attempt, _) = build_attempts(
        ["many-shot"], [prompt, *_prompts("benign", 1)], limit=1, per_prompt=1
    )
    roles = [m.role for m in attempt.messages]
    assert roles[:3] == ["system", "user", "assistant"]
    assert roles[-1] == "user"
    assert attempt.messages[-1].content == "q"


def test_over_refusal_asks_look_alikes_only() -> None:
    prompts = BOTH + _prompts("benign", 3, look_alike=True)
    attempts = build_attempts(["over-refusal"], prompts, limit=99, per_prompt=1)
    assert len(attempts) == 3
    assert not any(a.harmful for a in attempts)


@pytest.mark.parametrize(
    ("suite", "prompts", "wanted"),
    [
        ("direct", _prompts("benign", 3), "harmful requests"),
        ("wrappers", _prompts("harmful", 3), "benign requests"),
        ("over-refusal", BOTH, "benign look-alikes"),
        ("many-shot", [], "harmful requests"),
    ],
)
def test_an_empty_suite_is_named(suite: str, prompts: list[EvalPrompt], wanted: str) -> None:
    with pytest.raises(DataError, match=f"suite '{suite}' is empty: got no {wanted}"):
        build_attempts([suite], prompts, limit=9, per_prompt=1)


def test_suites_are_picked_by_name_in_order() -> None:
    assert pick_suites(()) == DEFAULT_SUITES
    assert pick_suites(["capability", "direct"]) == ("direct", "capability")
    with pytest.raises(ConfigError, match="got --suite 'nope'"):
        pick_suites(["nope"])
    assert set(DEFAULT_SUITES) < set(SUITES)
