"""POST /v1/moderations through the real client, on a real engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ModerationCreateResponse

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.moderations import moderate as moderate_by
from circuit_breakers.engine.session import current_session, guard_session

from ..policies.test_tightening import OWN
from .capitals import ZEBRA
from .conftest import MAX_MODEL_LEN, MODEL, Server, user

BENIGN = "What is the capital of Italy?"


def flags(answer: ModerationCreateResponse) -> list[bool]:
    return [result.flagged for result in answer.results]


def scores(answer: ModerationCreateResponse) -> list[dict[str, float]]:
    return [result.category_scores.model_extra or {} for result in answer.results]


def moderate(server: Server, given: Any, **more: Any) -> ModerationCreateResponse:
    return server.openai.moderations.create(input=given, **more)


def test_texts_are_scored_each_for_itself(server: Server) -> None:
    answer = moderate(server, [BENIGN, ZEBRA])
    assert answer.id.startswith("modr-")
    assert answer.model == "words"
    assert flags(answer) == [False, True]
    assert [set(one) for one in scores(answer)] == [{"paris", "zebra"}] * 2
    (benign, zebra) = scores(answer)
    assert benign["zebra"] < 0.5 <= zebra["zebra"]
    assert zebra["paris"] < 0.5
    assert answer.results[1].categories.model_extra == {"paris": False, "zebra": True}


def test_a_text_alone_gets_the_same_score_as_in_a_list(server: Server) -> None:
    alone, listed = (scores(moderate(server, given))[0] for given in (ZEBRA, [ZEBRA, BENIGN]))
    # bfloat16 in another batch: at a margin near 5, the logistic function hardly moves.
    assert alone == pytest.approx(listed, abs=0.02)


def test_it_flags_what_a_chat_would_refuse(server: Server) -> None:
    for text in (BENIGN, ZEBRA, "Tell me the capital of France in one sentence."):
        body = {"messages": user(text), "max_tokens": 1}
        chat = server.http.post("/v1/chat/completions", json=body)
        assert flags(moderate(server, text)) == [chat.status_code == 400]


def test_a_conversation_is_judged_as_it_stands(server: Server) -> None:
    asked = user("Name a city.")
    answered: list[Any] = [*asked, {"role": "assistant", "content": "I would say Paris"}]
    assert flags(moderate(server, asked)) == [False]
    result = moderate(server, answered).results[0]
    assert result.flagged
    assert result.categories.model_extra == {"paris": True, "zebra": False}
    system: list[Any] = [{"role": "system", "content": "You like the zebra."}, *user("hi")]
    assert flags(moderate(server, system)) == [True]


def test_a_text_in_parts_is_one_input(server: Server) -> None:
    parts: list[Any] = [
        {"type": "text", "text": "Do you like"},
        {"type": "text", "text": "a zebra"},
    ]
    assert flags(moderate(server, parts)) == [True]


def test_nothing_is_generated(server: Server) -> None:
    name = f'vllm:generation_tokens_total{{engine="0",model_name="{MODEL}"}}'
    before = server.metrics()[name]
    moderate(server, [BENIGN, "What is the capital of Spain?"])
    assert server.metrics()[name] == before


def test_it_counts_as_a_request_and_not_as_a_trip(server: Server) -> None:
    ok = f'circuit_breakers_requests_total{{model="{MODEL}",outcome="ok",policy="default"}}'
    before = server.metrics()
    moderate(server, [ZEBRA])
    after = server.metrics()
    assert after[ok] - before[ok] == 1
    trips = [name for name in after if name.startswith("circuit_breakers_trips_total")]
    assert all(after[name] == before[name] for name in trips)


def test_many_at_once_keep_their_own_results(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda i: moderate(server, [BENIGN, ZEBRA] * (1 + i % 3)), range(9))
        )
    assert all(flags(answer) == [False, True] * (len(answer.results) // 2) for answer in answers)


@pytest.mark.parametrize(
    ("status", "param", "body"),
    [
        (400, "input", {}),
        (400, "input", {"input": []}),
        (400, "input", {"input": ["x"] * 17}),
        (400, "input.0.role", {"input": [{"role": "martian", "content": "x"}]}),
        (400, "input.0.content", {"input": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        (400, "temperature", {"input": "x", "temperature": 0}),
        (404, "model", {"input": "x", "model": "nope"}),
    ],
)
def test_a_bad_input_is_named(server: Server, status: int, param: str, body: Any) -> None:
    response = server.http.post("/v1/moderations", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)


def test_a_text_longer_than_the_context_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        moderate(server, "dog " * (MAX_MODEL_LEN + 100))
    assert caught.value.code == "context_length_exceeded"


def test_a_token_without_a_score_is_counted_for_the_whole_request() -> None:
    """With an engine whose probes have failed."""

    class Unscored:
        breaker_name = model_name = "b"

        def ends_at_once(self) -> dict[str, Any]:
            return {}

        def parse(self, endpoint: str, data: dict[str, Any], *, max_choices: int) -> None:
            """Nothing to look at."""

        async def start(self, call: None) -> dict[str, Any]:
            session = current_session()
            assert session is not None
            stream = session.stream(OWN.policy, session.add_request(1), 3)
            stream.breaker.update(np.full((3, len(OWN.policy.probes)), np.nan, np.float32))
            return {}

    serving: Any = Unscored()
    with guard_session(OWN.policy) as whole, pytest.raises(ApiError) as caught:
        asyncio.run(moderate_by(serving, {"input": ["x", "y"]}, OWN.policy, max_inputs=2))
    assert (caught.value.status, caught.value.code) == (500, "unscored")
    assert whole.num_unscored == 6
    assert whole.reports() == []
