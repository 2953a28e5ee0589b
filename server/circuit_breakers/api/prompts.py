"""What a prompt may consist of, in each format: text, and nothing else.

The breaker is calibrated on text. An image or a file would be fetched before anything judges it, so
every part of a prompt is looked at before vLLM sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuit_breakers.api.errors import ApiError

__all__ = [
    "check_anthropic_messages",
    "check_completion",
    "check_messages",
    "check_response_input",
    "num_prompts",
]

# Tuples: a value that cannot be hashed compares all the same.
_ROLES = ("assistant", "developer", "function", "system", "tool", "user")
_TEXT_PARTS = ("refusal", "text")

_RESPONSE_ROLES = ("assistant", "developer", "system", "user")
_RESPONSE_PARTS = ("input_text", "output_text", "reasoning_text", "refusal", "summary_text", "text")
_RESPONSE_ITEMS = ("function_call", "function_call_output", "message", "reasoning")

_ANTHROPIC_ROLES = ("assistant", "system", "user")
_ANTHROPIC_BLOCKS = ("redacted_thinking", "text", "thinking", "tool_result", "tool_use")


def num_prompts(prompt: Any) -> int:
    """How many prompts the `prompt` of a completion request holds: text, tokens, or a list."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def check_completion(selected: Mapping[str, Any]) -> None:
    """Passes for a completion that does not ask what it must not; vLLM checks its prompt.

    Raises:
        ApiError: 400.
    """
    if selected.get("echo") and selected.get("logprobs") is not None:
        raise ApiError(
            400,
            "'echo' with 'logprobs' is not served: it asks for the logprobs of the prompt; "
            "remove one of them",
            code="unsupported_parameter",
            param="echo",
        )


def check_messages(selected: Mapping[str, Any], field: str = "messages") -> None:
    """Passes for the messages of a chat, made of text.

    Raises:
        ApiError: 400, naming the message.
    """
    for i, message in enumerate(_non_empty_list(selected.get(field), field)):
        where = f"{field}.{i}"
        _check_role(message, _ROLES, where)
        _check_parts(message.get("content"), _TEXT_PARTS, f"{where}.content")


def check_anthropic_messages(selected: Mapping[str, Any]) -> None:
    """Passes for the messages and the system prompt of Anthropic's format, made of text.

    Raises:
        ApiError: 400, naming the message.
    """
    for i, message in enumerate(_non_empty_list(selected.get("messages"), "messages")):
        where = f"messages.{i}"
        _check_role(message, _ANTHROPIC_ROLES, where)
        content = message.get("content")
        _check_parts(content, _ANTHROPIC_BLOCKS, f"{where}.content")
        for block in content if isinstance(content, list) else ():
            # What a tool gave back is a list of blocks again.
            _check_parts(block.get("content"), ("text",), f"{where}.content")
    _check_parts(selected.get("system"), ("text",), "system")


def check_response_input(selected: Mapping[str, Any]) -> None:
    """Passes for the input and the tools of a response, made of text and the client's functions.

    Raises:
        ApiError: 400, naming the item.
    """
    given = selected.get("input")
    if not isinstance(given, str):
        for i, item in enumerate(_non_empty_list(given, "input")):
            _check_response_item(item, f"input.{i}")
    elif not given:
        raise _invalid("got an empty text, expected one with something in it", "input")
    tools = selected.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise ApiError(
                400,
                f"got a tool of type {kind!r}, expected 'function': a server's own tools act "
                "before a later verdict; remove it",
                code="unsupported_value",
                param=f"tools.{i}",
            )


def _check_response_item(item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise _invalid(f"got a {type(item).__name__}, expected an object", where)
    kind = item.get("type", "message")
    if kind not in _RESPONSE_ITEMS:
        raise ApiError(
            400,
            f"got an item of type {kind!r}, expected one of {', '.join(_RESPONSE_ITEMS)}: the "
            "breaker is calibrated on text; send text",
            code="unsupported_value",
            param=where,
        )
    if kind == "message":
        _check_role(item, _RESPONSE_ROLES, where)
    for name in ("content", "output", "summary"):
        _check_parts(item.get(name), _RESPONSE_PARTS, f"{where}.{name}")


def _non_empty_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        got = "none" if value is None or value == [] else f"a {type(value).__name__}"
        raise _invalid(f"got {got}, expected a non-empty list of messages", where)
    return value


def _check_role(message: Any, roles: tuple[str, ...], where: str) -> None:
    if not isinstance(message, dict):
        raise _invalid(
            f"got a {type(message).__name__}, expected an object with role and content", where
        )
    if (role := message.get("role")) not in roles:
        raise _invalid(f"got role {role!r}, expected one of {', '.join(roles)}", f"{where}.role")


def _check_parts(content: Any, kinds: tuple[str, ...], where: str) -> None:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise ApiError(
                400,
                f"got a content part of type {kind!r}, expected 'text': the breaker is "
                "calibrated on text; send text",
                code="unsupported_value",
                param=where,
            )


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)
