"""on_trip="raise": one error for every way in which the server says that it stopped a request."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from circuit_breakers_client import (
    AsyncCircuitBreakers,
    CircuitBreakers,
    TrippedError,
    UnguardedError,
    guard_of,
    tighten,
)

from ...server.api.capitals import BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA
from ..conftest import Guarded
from .conftest import chat


class City(BaseModel):
    name: str


def test_a_trip_while_generating_is_raised(raising: CircuitBreakers) -> None:
    with pytest.raises(TrippedError) as caught:
        raising.chat.completions.create(**chat(FRANCE))
    error = caught.value
    assert (error.phase, error.probe, error.policy) == ("completion", "paris", "default")
    assert error.partial_text == BEFORE_PARIS
    assert error.score is not None and error.threshold == 0.0 <= error.score
    # " Paris" comes after the prompt and the five words before it.
    assert error.token_index is not None and error.token_index > 5
    assert guard_of(error) == error.report
    assert isinstance(error, openai.OpenAIError)
    assert "the completion was stopped by breaker 'words' at token" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.report, again.partial_text) == (error.report, error.partial_text)


def test_a_prompt_that_trips_is_raised(raising: CircuitBreakers) -> None:
    with pytest.raises(TrippedError) as caught:
        raising.chat.completions.create(**chat(ZEBRA))
    assert (caught.value.phase, caught.value.probe) == ("prompt", "zebra")
    assert caught.value.partial_text == ""
    assert isinstance(caught.value.__cause__, openai.BadRequestError)


def test_completions_and_responses_raise(raising: CircuitBreakers, guarded: Guarded) -> None:
    fields: dict[str, Any] = {"model": guarded.model, "temperature": 0}
    with pytest.raises(TrippedError) as caught:
        raising.completions.create(prompt=BEFORE_PARIS, max_tokens=8, **fields)
    assert caught.value.phase == "completion"
    with pytest.raises(TrippedError) as caught:
        raising.responses.create(input=FRANCE, max_output_tokens=32, **fields)
    assert caught.value.partial_text == BEFORE_PARIS


def test_a_parsed_chat_raises_with_its_report(raising: CircuitBreakers, guarded: Guarded) -> None:
    """openai's own error for a filtered answer would come without it."""
    echoed = raising.completions.create(
        model=guarded.model,
        prompt=" Paris",
        max_tokens=1,
        # Alone at position 0, which is never judged, the word says its token id.
        extra_body={"return_token_ids": True},
    )
    (paris,) = (echoed.choices[0].model_extra or {})["prompt_token_ids"]
    asked = chat("Name a city.", max_tokens=48, logit_bias={str(paris): 50})
    with pytest.raises(TrippedError) as caught:
        raising.chat.completions.parse(**asked, response_format=City)
    assert caught.value.probe == "paris"


def test_a_refusal_and_an_error_of_a_policy_are_trips_too(raising: CircuitBreakers) -> None:
    with pytest.raises(TrippedError) as caught:
        raising.chat.completions.create(**chat(FRANCE), **tighten(policy="refusing"))
    assert (caught.value.policy, caught.value.partial_text) == ("refusing", "No, sorry.")
    with pytest.raises(TrippedError) as caught:
        raising.chat.completions.create(**chat(FRANCE), **tighten(policy="failing"))
    assert (caught.value.policy, caught.value.partial_text) == ("failing", "")


def test_what_is_only_observed_is_not_raised(raising: CircuitBreakers, guarded: Guarded) -> None:
    watched = raising.with_options(api_key=guarded.watched_key)
    answer = watched.chat.completions.create(**chat(FRANCE))
    report = guard_of(answer)
    assert report is not None
    assert (report.mode, report.tripped) == ("observe", True)
    assert answer.choices[0].finish_reason == "stop"


def test_other_errors_stay_what_they_are(raising: CircuitBreakers) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        raising.chat.completions.create(**chat(ITALY), **tighten(mode="observe"))
    assert caught.value.code == "policy_not_allowed"
    with pytest.raises(openai.AuthenticationError):
        raising.with_options(api_key="nobody").models.list()


def test_the_asynchronous_client_does_the_same(guarded: Guarded) -> None:
    async def run() -> None:
        async with AsyncCircuitBreakers(
            base_url=guarded.url, api_key=guarded.key, max_retries=0
        ) as client:
            answer = await client.chat.completions.create(**chat(ITALY))
            report = guard_of(answer)
            assert report is not None and not report.tripped
            raising = client.with_options(on_trip="raise")
            for text, phase in ((FRANCE, "completion"), (ZEBRA, "prompt")):
                with pytest.raises(TrippedError) as caught:
                    await raising.chat.completions.create(**chat(text))
                assert caught.value.phase == phase
            stream = await client.chat.completions.create(**chat(ITALY), stream=True)
            said = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(said) == ROME
            assert guard_of(stream) == report
            stream = await raising.chat.completions.create(**chat(FRANCE), stream=True)
            with pytest.raises(TrippedError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.partial_text == BEFORE_PARIS

    asyncio.run(run())


def test_unguarded_error_says_the_cure() -> None:
    error = pickle.loads(pickle.dumps(UnguardedError("an answer without one")))
    assert str(error).startswith("got an answer without one, expected a guard report;")
    assert "require_guard=False" in str(error)
