"""The closed lists themselves: nothing that gets around the guard, and no field forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from circuit_breakers.api.endpoints import ENDPOINTS, Endpoint
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.field_lists import COMPLETION_FIELDS, MESSAGE_FIELDS, RESPONSE_FIELDS

from ...vllm_release import needs_vllm_0_32

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return ENDPOINTS["chat"].rules.select({"messages": MESSAGES, **fields}, max_choices=4)


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_every_field_of_vllm_is_listed_never_forgotten(endpoint: Endpoint) -> None:
    from circuit_breakers.api.serving import REQUEST_MODELS

    rules = ENDPOINTS[endpoint].rules
    # A new vLLM field must be looked at before it is let through.
    assert set(REQUEST_MODELS[endpoint].model_fields) <= rules.names | rules.refused.keys()
    assert not rules.names & rules.refused.keys()


@pytest.mark.parametrize(
    "endpoint",
    [
        "chat",
        "completion",
        pytest.param("response", marks=needs_vllm_0_32),
        pytest.param("message", marks=needs_vllm_0_32),
    ],
)
def test_every_allowed_field_is_one_of_vllms(endpoint: Endpoint) -> None:
    from circuit_breakers.api.serving import REQUEST_MODELS

    assert ENDPOINTS[endpoint].rules.allowed <= set(REQUEST_MODELS[endpoint].model_fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_beam_search", True),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("ec_transfer_params", {"a": 1}),
        ("cache_salt", "salt"),
        ("vllm_xargs", {"a": 1}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("include_stop_str_in_output", True),
        ("prompt_logprobs", 0),
        ("truncate_prompt_tokens", 8),
        ("priority", -1),
        ("echo", True),
        ("add_special_tokens", True),
        ("request_id", "mine"),
        ("stop_token_ids", [2]),
        ("repetition_detection", {"max_pattern_size": 1, "min_count": 2}),
    ],
)
def test_refuses_what_gets_around_the_guard(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"'{field}' is not served") as caught:
        chat(**{field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field)


def test_refuses_prompt_embeddings_and_the_logprobs_of_an_echo() -> None:
    for fields in ({"prompt_embeds": "AAAA"}, {"prompt": "hi", "echo": True, "logprobs": 0}):
        with pytest.raises(ApiError, match="not served"):
            COMPLETION_FIELDS.select(fields, max_choices=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("chat_template_kwargs", {"a": 1}),
        ("conversation", "conv_1"),
        ("enable_response_messages", True),
        ("include_stop_str_in_output", True),
        ("kv_transfer_params", {"a": 1}),
        ("previous_input_messages", [{}]),
        ("previous_response_id", "resp_1"),
        ("stop_token_ids", [2]),
        ("truncation", "auto"),
        ("vllm_xargs", {"a": 1}),
    ],
)
def test_a_response_has_nothing_of_the_engines_and_nothing_stored(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"'{field}' is not served"):
        RESPONSE_FIELDS.select({"input": "hi", field: value}, max_choices=4)


@pytest.mark.parametrize("field", ["cache_salt", "chat_template_kwargs", "kv_transfer_params"])
def test_a_message_has_nothing_of_the_engines(field: str) -> None:
    with pytest.raises(ApiError, match=f"'{field}' is not served"):
        MESSAGE_FIELDS.select({"messages": MESSAGES, field: {"a": 1}}, max_choices=4)


def test_what_changes_nothing_does_not_reach_vllm() -> None:
    selected = RESPONSE_FIELDS.select(
        {"input": "hi", "store": True, "service_tier": "auto", "truncation": "disabled"},
        max_choices=4,
    )
    assert selected == {"input": "hi"}
