"""POST /v1/moderations: texts and conversations are scored by prefill alone; nothing is generated.

They go the way of every chat: template, tokenizer, engine, probes. So a text is flagged exactly
where a chat that asks it would be stopped before its answer. The one token that an engine samples
at the end of every prefill can only be the end of the turn, which ends the request in that step.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.field_lists import MODERATION_FIELDS
from circuit_breakers.api.moderation import (
    check_moderation_model,
    conversations,
    moderation_result,
)
from circuit_breakers.engine.session import current_session, guard_session
from circuit_breakers.guard.policy import Policy

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Serving

__all__ = ["moderate"]


async def moderate(
    serving: Serving, data: dict[str, Any], policy: Policy, *, max_inputs: int
) -> dict[str, Any]:
    """The answer to one moderation request, in OpenAI's shape.

    Args:
        policy: whose thresholds count, and whose probes are judged.
    Raises:
        ApiError: the input is nothing to judge, too much or too long, or a token got no score.
    """
    selected = MODERATION_FIELDS.select(data, max_choices=max_inputs)
    breaker = serving.breaker_name
    known = (breaker, serving.model_name)
    check_moderation_model(selected.get("model"), known, param="model")
    asked = conversations(selected.get("input"), max_inputs=max_inputs)
    tasks = [asyncio.create_task(_margins(serving, policy, messages)) for messages in asked]
    try:
        margins = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "id": f"modr-{uuid4().hex}",
        "model": breaker,
        "results": [moderation_result(one) for one in margins],
    }


async def _margins(
    serving: Serving, policy: Policy, messages: list[dict[str, Any]]
) -> dict[str, float]:
    """By probe, how far a conversation's highest score lies above the threshold."""
    # An answer is judged as the server saw it being written: without the end of its turn.
    answered = messages[-1].get("role") == "assistant"
    request = {
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0,
        **serving.ends_at_once(),
        "add_generation_prompt": not answered,
        "continue_final_message": answered,
    }
    whole = current_session()
    with guard_session(policy) as session:
        try:
            await serving.start(serving.parse("chat", request, max_choices=1))
        except ApiError as error:
            error.param = (error.param or "input").replace("messages", "input", 1)
            raise
        finally:
            if whole is not None:
                whole.add_faults(session)
        margins = session.margins_for(0, "prompt")
    if margins is None:
        raise ApiError(
            500,
            "a token of the input came back without a score; nothing can be said of it, restart "
            "the server",
            code="unscored",
        )
    return margins
