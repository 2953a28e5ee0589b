"""Reports of whole answers: chat completions, completions, responses, errors, plain JSON."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import openai
import pytest

from circuit_breakers_client import CircuitBreakers, GuardReport, guard_of

from ...server.api.test_openai_client import BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA
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
