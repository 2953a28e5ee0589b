"""The endpoints that generate: their fields, and the format of their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from circuit_breakers.api.field_lists import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    RESPONSE_FIELDS,
)
from circuit_breakers.api.fields import FieldRules
from circuit_breakers.api.formats import ChoicesFormat, Format
from circuit_breakers.api.message_format import MessageFormat
from circuit_breakers.api.response_format import ResponseFormat

__all__ = ["ENDPOINTS", "Endpoint", "EndpointSpec"]

Endpoint = Literal["chat", "completion", "response", "message"]


@dataclass(frozen=True, kw_only=True)
class EndpointSpec:
    """What tells one generating endpoint from the others."""

    rules: FieldRules
    format: Format
    id_prefix: str = ""
    """Of the answer's id, before vLLM's id of the request."""
    chunk_object: str = ""
    """`object` of a chunk; formats without chunks have none."""


ENDPOINTS: dict[Endpoint, EndpointSpec] = {
    "chat": EndpointSpec(
        rules=CHAT_FIELDS,
        format=ChoicesFormat(),
        id_prefix="chatcmpl-",
        chunk_object="chat.completion.chunk",
    ),
    "completion": EndpointSpec(
        rules=COMPLETION_FIELDS,
        format=ChoicesFormat(),
        id_prefix="cmpl-",
        chunk_object="text_completion",
    ),
    "response": EndpointSpec(rules=RESPONSE_FIELDS, format=ResponseFormat()),
    "message": EndpointSpec(rules=MESSAGE_FIELDS, format=MessageFormat()),
}
