"""What a prompt may consist of, in each format."""

from __future__ import annotations

from typing import Any

import pytest

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.prompts import (
    check_anthropic_messages,
    check_messages,
    check_response_input,
    num_prompts,
)

URL = "http://169.254.169.254/latest"
IMAGE = {"type": "image", "source": {"type": "url", "url": URL}}


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        5,
        "hi",
        [5],
        [{"content": "hi"}],
        [{"role": "martian", "content": "hi"}],
        [{"role": ["user"], "content": "hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
        [{"role": "user", "content": ["hi"]}],
    ],
)
def test_refuses_messages_that_are_not_text(messages: Any) -> None:
    with pytest.raises(ApiError) as caught:
        check_messages({"messages": messages})
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([], 1), (None, 1)],
)
def test_counts_prompts(prompt: Any, expected: int) -> None:
    assert num_prompts(prompt) == expected


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        [],
        5,
        [5],
        [{"role": "tool", "content": "hi"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}],
        [{"role": "user", "content": [{"type": "input_file", "file_url": URL}]}],
        [{"type": "item_reference", "id": "rs_1"}],
        [{"type": "computer_call_output", "call_id": "1", "output": {"image_url": URL}}],
        [
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_image", "image_url": URL}],
            }
        ],
        [{"type": ["message"], "role": "user", "content": "hi"}],
    ],
)
def test_refuses_a_response_input_that_is_not_text(given: Any) -> None:
    with pytest.raises(ApiError) as caught:
        check_response_input({"input": given})
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith("input")


def test_takes_every_kind_of_text_in_a_response_input() -> None:
    check_response_input({"input": "hi"})
    check_response_input(
        {
            "input": [
                {"role": "developer", "content": "be kind"},
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "x"}],
                },
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
        }
    )


@pytest.mark.parametrize("tool", [{"type": "mcp", "server_url": URL}, {"type": "web_search"}, 5])
def test_refuses_tools_that_the_server_would_run(tool: Any) -> None:
    with pytest.raises(ApiError, match="got a tool of type") as caught:
        check_response_input({"input": "hi", "tools": [tool]})
    assert caught.value.param == "tools.0"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        # A tool's result is a list of blocks again.
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [IMAGE]}]}]},
        {"messages": [{"role": "system", "content": [{"type": "tool_addition", "tool": {}}]}]},
        {"messages": [{"role": "user", "content": "hi"}], "system": [IMAGE]},
    ],
)
def test_refuses_anthropic_messages_that_are_not_text(fields: Any) -> None:
    with pytest.raises(ApiError) as caught:
        check_anthropic_messages(fields)
    assert caught.value.status == 400


def test_takes_text_and_tools_in_anthropic_messages() -> None:
    check_anthropic_messages(
        {
            "system": [{"type": "text", "text": "be kind"}],
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "content": [{"type": "text", "text": "x"}]},
                        {"type": "tool_result", "content": "x"},
                    ],
                },
            ],
        }
    )
