"""Reports of whole answers: chat completions, completions, responses, errors, plain JSON."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import openai
import pytest

from circuit_breakers_client import (
    CircuitBreakers,
    GuardReport,
    TokenScore,
    TrippedError,
    guard_of,
    tighten,
    token_scores_of,
)

from ...server.api.capitals import BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA
from ..conftest import Guarded
from .conftest import chat

REPORT = {
    "breaker": "words",
    "policy": "default",
    "mode": "enforce",
    "tripped": True,
    "phase": "completion",
    "probe": "paris",
    "score": 1.5,
    "threshold": 0.0,
    "token_index": 41,
}


def test_a_report_is_what_the_server_says_and_is_frozen() -> None:
    report = guard_of({"guard": REPORT | {"from_a_newer_server": 1}})
    assert report == GuardReport(**REPORT)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        report.tripped = False  # type: ignore[misc, union-attr]


@pytest.mark.parametrize(
    "change",
    [
        {"tripped": "no"},
        {"tripped": None},
        {"mode": "off"},
        {"phase": "reasoning"},
        {"score": True},
        {"token_index": 1.5},
        {"policy": None},
    ],
)
def test_what_is_no_report_is_none(change: dict[str, Any]) -> None:
    assert guard_of({"guard": REPORT | change}) is None


@pytest.mark.parametrize("source", [None, {}, "text", {"guard": None}, {"guard": []}, 3])
def test_what_has_no_report_is_none(source: object) -> None:
    assert guard_of(source) is None


def test_a_chat_that_passes_has_a_report(client: CircuitBreakers) -> None:
    answer = client.chat.completions.create(**chat(ITALY))
    report = guard_of(answer)
    assert answer.choices[0].message.content == ROME
    assert report is not None
    assert (report.breaker, report.policy, report.mode) == ("words", "default", "enforce")
    assert (report.tripped, report.phase, report.threshold) == (False, None, 0.0)
    assert guard_of(answer.choices[0]) == report
    assert guard_of(answer.model_dump()) == report


def test_a_chat_that_trips_is_returned(client: CircuitBreakers) -> None:
    answer = client.chat.completions.create(**chat(FRANCE))
    report = guard_of(answer)
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].message.content == BEFORE_PARIS
    assert report is not None
    assert (report.tripped, report.phase, report.probe) == (True, "completion", "paris")
    assert report.score is not None and report.score >= 0.0


def test_completions_and_responses_have_reports(client: CircuitBreakers, guarded: Guarded) -> None:
    completion = client.completions.create(
        model=guarded.model, prompt="The capital of Italy is", temperature=0, max_tokens=2
    )
    response = client.responses.create(
        model=guarded.model, input=FRANCE, temperature=0, max_output_tokens=32
    )
    reports = (guard_of(completion), guard_of(response))
    assert [report and report.tripped for report in reports] == [False, True]


def test_a_prompt_that_trips_stays_a_bad_request(client: CircuitBreakers) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat(ZEBRA))
    report = guard_of(caught.value)
    assert caught.value.code == "content_filter"
    assert report is not None
    assert (report.phase, report.probe) == ("prompt", "zebra")


def test_a_raw_answer_is_checked_when_it_is_parsed(client: CircuitBreakers) -> None:
    raw = client.chat.completions.with_raw_response.create(**chat(ITALY))
    report = guard_of(raw.parse())
    assert report is not None and not report.tripped
    with client.chat.completions.with_streaming_response.create(**chat(ITALY)) as response:
        assert guard_of(response.parse()) == report


def test_what_is_not_generated_needs_no_report(client: CircuitBreakers, guarded: Guarded) -> None:
    assert client.models.retrieve(guarded.model).id == guarded.model
    assert client.moderations.create(input="hello").results[0].flagged is False


@pytest.fixture
def admin(client: CircuitBreakers, guarded: Guarded) -> CircuitBreakers:
    return client.with_options(api_key=guarded.admin_key)


def test_an_admin_has_the_score_of_each_token(admin: CircuitBreakers) -> None:
    asked = tighten(token_scores=True)
    answer = admin.chat.completions.create(**chat(ITALY), **asked)
    whole = token_scores_of(answer.choices[0])
    assert whole is not None
    first = TokenScore(
        index=0, phase="prompt", token="<|im_start|>", score=None, probe=None, threshold=None
    )
    assert whole[0] == first
    assert "".join(one.token or "" for one in whole if one.phase == "completion") == ROME
    stream = admin.chat.completions.create(**chat(ITALY), **asked, stream=True)
    parts = [token_scores_of(choice) for chunk in stream for choice in chunk.choices]
    assert [one.token for part in parts for one in part or ()] == [one.token for one in whole]
    assert token_scores_of(answer) is None


@pytest.mark.parametrize("on_trip", ["return", "raise"])
def test_a_prompt_that_trips_has_its_scores(admin: CircuitBreakers, on_trip: Any) -> None:
    with pytest.raises((openai.BadRequestError, TrippedError)) as caught:
        admin.with_options(on_trip=on_trip).chat.completions.create(
            **chat(ZEBRA), **tighten(token_scores=True)
        )
    scores = token_scores_of(caught.value)
    assert scores is not None
    assert (scores[-1].phase, scores[-1].token, scores[-1].probe) == ("prompt", " zebra", "zebra")


def test_what_are_no_token_scores_is_none() -> None:
    item = {"index": 0, "phase": "prompt", "token": "a", "score": 1.0, "probe": "p"}
    assert token_scores_of({"token_scores": [item]}) is not None
    changes: list[dict[str, Any]] = [{"index": None}, {"phase": None}, {"score": "1"}, {"token": 1}]
    for change in changes:
        assert token_scores_of({"token_scores": [item | change]}) is None
