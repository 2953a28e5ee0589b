"""Streams: the report is there at the end, and a trip is raised in place of the last chunk."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from circuit_breakers_client import CircuitBreakers, GuardedStream, TrippedError, guard_of, tighten

from ...server.api.capitals import BEFORE_PARIS, FRANCE, ITALY, ROME
from ..conftest import Guarded
from .conftest import chat


def test_the_report_is_on_the_last_chunk_and_on_the_stream(client: CircuitBreakers) -> None:
    stream = client.chat.completions.create(**chat(ITALY), stream=True)
    assert isinstance(stream, GuardedStream)
    assert guard_of(stream) is None
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ROME
    assert [guard_of(chunk) for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    report = guard_of(chunks[-1])
    assert report is not None and report == guard_of(stream)


def test_usage_may_come_after_the_report(client: CircuitBreakers) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(**chat(ITALY), stream=True, stream_options=options)
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert guard_of(stream) == guard_of(chunks[-2]) is not None


def test_every_choice_is_waited_for(client: CircuitBreakers) -> None:
    stream = client.chat.completions.create(**chat(ITALY, n=2, temperature=0.5), stream=True)
    reports = [report for chunk in stream if (report := guard_of(chunk))]
    assert len(reports) == 2
    assert guard_of(stream) in reports


def test_a_trip_is_returned(client: CircuitBreakers) -> None:
    stream = client.chat.completions.create(**chat(FRANCE), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == BEFORE_PARIS
    report = guard_of(stream)
    assert report is not None and report.tripped


def test_a_trip_is_raised_with_what_was_said(raising: CircuitBreakers) -> None:
    stream = raising.chat.completions.create(**chat(FRANCE), stream=True)
    said = []
    with pytest.raises(TrippedError) as caught:
        for chunk in stream:
            said.append(chunk.choices[0].delta.content or "")
            assert chunk.choices[0].finish_reason is None
    assert "".join(said) == BEFORE_PARIS == caught.value.partial_text
    assert guard_of(stream) == caught.value.report
    assert stream.response.is_closed


def test_a_policy_that_answers_trips_by_an_error_is_raised(raising: CircuitBreakers) -> None:
    stream = raising.chat.completions.create(
        **chat(FRANCE), stream=True, **tighten(policy="failing")
    )
    with pytest.raises(TrippedError) as caught:
        list(stream)
    assert (caught.value.policy, caught.value.partial_text) == ("failing", BEFORE_PARIS)
    assert isinstance(caught.value.__cause__, openai.APIError)


def test_such_an_error_is_returned_as_openai_raises_it(client: CircuitBreakers) -> None:
    stream = client.chat.completions.create(
        **chat(FRANCE), stream=True, **tighten(policy="failing")
    )
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    report = guard_of(caught.value)
    assert report is not None and report == guard_of(stream)


def test_completions_are_streamed(client: CircuitBreakers, guarded: Guarded) -> None:
    stream = client.completions.create(
        model=guarded.model, prompt=BEFORE_PARIS, temperature=0, max_tokens=8, stream=True
    )
    list(stream)
    report = guard_of(stream)
    assert report is not None and report.probe == "paris"


def test_responses_are_streamed(client: CircuitBreakers, guarded: Guarded) -> None:
    asked: dict[str, Any] = {
        "model": guarded.model,
        "temperature": 0,
        "max_output_tokens": 32,
        "stream": True,
    }
    stream = client.responses.create(input=ITALY, **asked)
    events = list(stream)
    assert guard_of(events[-1]) == guard_of(stream) is not None
    raising = client.with_options(on_trip="raise")
    with pytest.raises(TrippedError) as caught:
        list(raising.responses.create(input=FRANCE, **asked))
    assert caught.value.partial_text == BEFORE_PARIS


def test_the_helpers_streams_have_reports(client: CircuitBreakers, guarded: Guarded) -> None:
    with client.chat.completions.stream(**chat(ITALY)) as stream:
        assert stream.get_final_completion().choices[0].message.content == ROME
        report = guard_of(stream)
        assert report is not None and not report.tripped
    with client.responses.stream(model=guarded.model, input=ITALY, temperature=0) as responses:
        responses.until_done()
        assert guard_of(responses) is not None
    raising = client.with_options(on_trip="raise")
    with pytest.raises(TrippedError), raising.chat.completions.stream(**chat(FRANCE)) as stream:
        stream.until_done()
