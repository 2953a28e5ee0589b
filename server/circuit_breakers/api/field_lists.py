"""The closed lists of request fields, one for each route that generates or scores.

What is refused here would show a token before its verdict, change what the probes read, or reach
into the engine. A field that a new vLLM adds is in none of the lists, and so a 400.
"""

from __future__ import annotations

from typing import Any

from circuit_breakers.api.fields import FieldRules
from circuit_breakers.api.prompts import (
    check_anthropic_messages,
    check_completion,
    check_messages,
    check_response_input,
)

__all__ = [
    "CHAT_FIELDS",
    "COMPLETION_FIELDS",
    "MESSAGE_FIELDS",
    "MODERATION_FIELDS",
    "RESPONSE_FIELDS",
]

_SHARED_ALLOWED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stream",
        "stream_options",
        "structured_outputs",
        "temperature",
        "thinking_token_budget",
        "top_k",
        "top_p",
        "user",
    }
)

_SHARED_IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "store"})

_OFF = (None, False)
_INTERNAL = "it belongs to the engine's own plumbing"
_TEMPLATE = "the breaker is calibrated on the model's own chat template"
_TRUNCATION = "a prompt is judged as it was sent"
_BEAM = "beam search feeds its beams back as prompts, past the verdict"
_MULTIMODAL = "the breaker is calibrated on text"
_UNSCORED_END = "where it ends a completion, it tells of a token that has no score; use 'stop'"

_SHARED_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cache_salt": (_INTERNAL, (None,)),
    "ec_transfer_params": (_INTERNAL, (None,)),
    "include_stop_str_in_output": ("a stop string would leave before it is scored", _OFF),
    "kv_transfer_params": (_INTERNAL, (None,)),
    "length_penalty": (_BEAM, (None, 1.0, 1)),
    "mm_payload": (_MULTIMODAL, (None, "tensors")),
    "priority": (_INTERNAL, (None, 0)),
    "prompt_logprobs": ("it would tell of a prompt before the verdict", (None,)),
    "repetition_detection": (_UNSCORED_END, (None,)),
    "request_id": (_INTERNAL, (None,)),
    "return_mm_kwargs": (_MULTIMODAL, _OFF),
    "return_token_offsets": (_INTERNAL, _OFF),
    "routed_experts_prompt_start": (_INTERNAL, (None, 0)),
    "session_id": (_INTERNAL, (None,)),
    "stop_token_ids": (_UNSCORED_END, (None, [])),
    "stream_interval": (_INTERNAL, (None, 1)),
    "truncate_prompt_tokens": (_TRUNCATION, (None,)),
    "truncation_side": (_TRUNCATION, (None,)),
    "use_beam_search": (_BEAM, _OFF),
    "vllm_xargs": (_INTERNAL, (None, {})),
    "watermarking": (_INTERNAL, _OFF),
}

CHAT_FIELDS = FieldRules(
    prompt_field="messages",
    check=check_messages,
    has_token_scores=True,
    own=frozenset({"moderation"}),
    allowed=_SHARED_ALLOWED
    | {
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "include_reasoning",
        "max_completion_tokens",
        "messages",
        "parallel_tool_calls",
        "reasoning_effort",
        "return_prompt_text",
        "tool_choice",
        "tools",
        "top_logprobs",
    },
    ignored=_SHARED_IGNORED,
    refused=_SHARED_REFUSED
    | {
        "add_special_tokens": (_TEMPLATE, _OFF),
        "chat_template": (_TEMPLATE, (None,)),
        "chat_template_kwargs": (_TEMPLATE, (None, {})),
        "echo": ("read the last message from the request instead", _OFF),
        "media_io_kwargs": (_MULTIMODAL, (None, {})),
        "mm_processor_kwargs": (_MULTIMODAL, (None, {})),
    },
)

COMPLETION_FIELDS = FieldRules(
    prompt_field="prompt",
    check=check_completion,
    has_token_scores=True,
    allowed=_SHARED_ALLOWED | {"echo", "prompt", "suffix"},
    ignored=_SHARED_IGNORED,
    refused=_SHARED_REFUSED
    | {
        "add_special_tokens": ("a prompt always starts as the model was trained", (None, True)),
        "best_of": (_BEAM, (None, 1)),
        "prompt_embeds": ("the breaker reads tokens", (None,)),
    },
)

_STORED = "nothing is stored here, as nobody could say whose it is; send the whole conversation"

RESPONSE_FIELDS = FieldRules(
    prompt_field="input",
    check=check_response_input,
    own=frozenset({"moderation"}),
    allowed=frozenset(
        {
            "frequency_penalty",
            "ignore_eos",
            "include",
            "include_reasoning",
            "input",
            "instructions",
            "logit_bias",
            "max_output_tokens",
            "metadata",
            "min_p",
            "model",
            "parallel_tool_calls",
            "presence_penalty",
            "reasoning",
            "repetition_penalty",
            "seed",
            "skip_special_tokens",
            "stop",
            "stream",
            "structured_outputs",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_k",
            "top_logprobs",
            "top_p",
            "user",
        }
    ),
    ignored=frozenset(
        {
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "stream_options",
        }
    ),
    refused=_SHARED_REFUSED
    | {
        "background": (_STORED, _OFF),
        "chat_template_kwargs": (_TEMPLATE, (None, {})),
        "conversation": (_STORED, (None,)),
        "enable_response_messages": (_INTERNAL, _OFF),
        "media_io_kwargs": (_MULTIMODAL, (None, {})),
        "mm_processor_kwargs": (_MULTIMODAL, (None, {})),
        "previous_input_messages": (_STORED, (None,)),
        "previous_response_id": (_STORED, (None,)),
        "prompt": ("prompt templates are kept at OpenAI; send 'input'", (None,)),
        "truncation": (_TRUNCATION, (None, "disabled")),
    },
)

MESSAGE_FIELDS = FieldRules(
    prompt_field="messages",
    check=check_anthropic_messages,
    required=("model", "max_tokens"),
    allowed=frozenset(
        {
            "max_tokens",
            "messages",
            "model",
            "output_config",
            "stop_sequences",
            "stream",
            "system",
            "temperature",
            "thinking",
            "tool_choice",
            "tools",
            "top_k",
            "top_p",
        }
    ),
    ignored=frozenset({"metadata", "service_tier"}),
    refused=_SHARED_REFUSED | {"chat_template_kwargs": (_TEMPLATE, (None, {}))},
)

MODERATION_FIELDS = FieldRules(
    prompt_field="input",
    # Read by the route itself: vLLM gets conversations made of it.
    check=lambda selected: None,
    allowed=frozenset({"input", "model"}),
    ignored=frozenset({"safety_identifier", "user"}),
    refused={},
)
