"""What the client sees of a trip, by its policy's action: the text up to there, a refusal, or 400.

    stop     the text before the trip, finish reason content_filter; a tripped prompt is a 400
    refuse   a refusal in the place of the text, finish reason content_filter, for a prompt too
    error    HTTP 400; in a stream that has begun, an error event and the end

What a stream has sent before its trip cannot be taken back: there `refuse` adds its text after it.
A stream of /v1/responses or /v1/messages has no place for it: there `refuse` does what `stop` does.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from circuit_breakers.api.endpoints import Endpoint
from circuit_breakers.api.errors import prompt_tripped, stopped
from circuit_breakers.api.responses import DONE, data_event
from circuit_breakers.api.token_scores import TOKEN_SCORES, withheld
from circuit_breakers.engine.session import GuardSession
from circuit_breakers.metrics import was_stopped
from circuit_breakers.policies.served_policy import ServedPolicy

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Call

__all__ = ["act_on_body", "act_on_prompt", "act_on_stream"]

_STOPPED_MARK = '"finish_reason":"content_filter"'
_WITH_CHOICES: tuple[Endpoint, ...] = ("chat", "completion")
_NOT_TEXT = ("guard", "content_filter_results", "content_filter_offsets")
"""Fields of a choice that say something of its text, and nothing out of it."""


def act_on_prompt(
    session: GuardSession, served: ServedPolicy, call: Call, *, may_refuse: bool = True
) -> None:
    """Passes unless a prompt has tripped and nothing but an error can be said.

    Args:
        may_refuse: there is an answer that a refusal can be put into.
    Raises:
        ApiError: 400 content_filter.
    """
    report = session.prompt_tripped
    if report is None:
        return
    has_place = may_refuse and (call.endpoint in _WITH_CHOICES or not call.streams)
    if served.action != "refuse" or not has_place:
        raise prompt_tripped(report, param=call.prompt_field)


def act_on_body(
    body: dict[str, Any], session: GuardSession, served: ServedPolicy, endpoint: Endpoint
) -> None:
    """Replaces the text of each stopped choice, or passes where nothing was stopped.

    Raises:
        ApiError: 400 content_filter under action `error`.
    """
    if served.action == "stop":
        return
    if endpoint in _WITH_CHOICES:
        _act_on_choices(body, session, served)
    elif (report := session.stopped) is not None:
        if served.action == "error":
            raise stopped(report)
        if endpoint == "message":
            body["content"] = [{"type": "text", "text": served.refusal}]
        else:
            body["output"] = [_output_message(served.refusal)]


def _act_on_choices(body: dict[str, Any], session: GuardSession, served: ServedPolicy) -> None:
    for number, choice in enumerate(body["choices"]):
        report = session.report_for(choice["index"])
        if report is None or not was_stopped(report):
            continue
        if served.action == "error":
            raise stopped(report)
        text: dict[str, Any] = {"text": served.refusal}
        if "message" in choice:
            text = {"message": {"role": "assistant", "content": served.refusal}}
        # Nothing else of it stays: logprobs, token ids, tool calls and reasoning are text too.
        body["choices"][number] = {
            "index": choice["index"],
            **text,
            "logprobs": None,
            "finish_reason": "content_filter",
            **{name: choice[name] for name in _NOT_TEXT if name in choice},
            **_withheld_scores(choice),
        }


def _withheld_scores(choice: dict[str, Any]) -> dict[str, Any]:
    return {TOKEN_SCORES: withheld(choice[TOKEN_SCORES])} if TOKEN_SCORES in choice else {}


def _output_message(text: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "incomplete",
        "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": None}],
    }


def act_on_stream(
    events: AsyncGenerator[str, None],
    session: GuardSession,
    served: ServedPolicy,
    endpoint: Endpoint = "chat",
) -> AsyncGenerator[str, None]:
    """The events of a stream whose stopped choices end by the action.

    Raises:
        ApiError: while iterating, under action `error` where the format has no choices.
    """
    if served.action == "stop":
        return events
    return _acted_on(events, session, served, endpoint)


async def _acted_on(
    events: AsyncGenerator[str, None],
    session: GuardSession,
    served: ServedPolicy,
    endpoint: Endpoint,
) -> AsyncGenerator[str, None]:
    num_events = 0
    try:
        async for event in events:
            if endpoint not in _WITH_CHOICES:
                if served.action == "error" and (report := session.stopped) is not None:
                    raise stopped(report)
                yield event
                continue
            if _STOPPED_MARK in event:
                chunk = json.loads(event.removeprefix("data: "))
                for choice in chunk["choices"]:
                    report = session.report_for(choice["index"])
                    if report is None or not was_stopped(report):
                        continue
                    if served.action == "error":
                        error = stopped(report)
                        error.token_scores = _withheld_scores(choice).get(TOKEN_SCORES)
                        yield data_event(error.to_json())
                        yield DONE
                        return
                    # vLLM's first event of a chat has the role, if there is one before the end.
                    _refuse_in_last_chunk(choice, served, has_role=num_events > 0)
                event = data_event(chunk)
            num_events += 1
            yield event
    finally:
        await events.aclose()


def _refuse_in_last_chunk(choice: dict[str, Any], served: ServedPolicy, *, has_role: bool) -> None:
    # The chunk may bring the last of the text, too, for a client that reads slowly.
    scores = _withheld_scores(choice)
    for name in choice.keys() - {"index", "finish_reason", *_NOT_TEXT}:
        choice[name] = None
    choice |= scores
    if "delta" in choice:
        choice["delta"] = {} if has_role else {"role": "assistant"}
        choice["delta"]["content"] = served.refusal
    else:
        choice["text"] = served.refusal
