"""Which request fields are let through to vLLM's serving classes, and why the others are not.

vLLM's request models accept any field and many of their own would get around the guard. So both
lists are closed: a field is allowed, ignored, refused with a reason, or unknown. A refused field
with its neutral value says nothing and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from circuit_breakers.api.errors import ApiError

__all__ = ["CHAT_FIELDS", "COMPLETION_FIELDS", "FieldRules", "num_prompts"]

# Tuples: a value that cannot be hashed compares all the same.
_ROLES = ("assistant", "developer", "function", "system", "tool", "user")
_TEXT_PARTS = ("refusal", "text")
_MAX_CHARS = {
    "response_format": 1 << 16,
    "stop": 1 << 12,
    "structured_outputs": 1 << 16,
    "tools": 1 << 17,
}
"""Longest value of a field, as JSON: far above what people send."""
_MAX_GRAMMAR_CHOICES = 512


@dataclass(frozen=True, kw_only=True)
class FieldRules:
    """The closed lists of one endpoint."""

    prompt_field: str
    """The field that holds the prompt."""
    allowed: frozenset[str]
    ignored: frozenset[str]
    """Fields of OpenAI's API that change nothing here."""
    refused: Mapping[str, tuple[str, tuple[Any, ...]]]
    """Field -> (why, values that are the same as leaving it out)."""

    def select(self, data: dict[str, Any], *, max_choices: int) -> dict[str, Any]:
        """The fields of `data` that go on to vLLM.

        Raises:
            ApiError: 400 for an unknown or refused field, an empty prompt, or too many choices.
        """
        if unknown := sorted(data.keys() - self.allowed - self.ignored - self.refused.keys()):
            raise ApiError(
                400,
                f"unknown fields: {', '.join(map(repr, unknown))}; remove them, or see "
                "/openapi.json for the fields that are served",
                code="unknown_parameter",
                param=unknown[0],
            )
        for name in sorted(data.keys() & self.refused.keys()):
            why, neutral = self.refused[name]
            # Compared by type too: 1 == True, and a list of strings is never neutral.
            if not any(type(data[name]) is type(v) and data[name] == v for v in neutral):
                raise ApiError(
                    400,
                    f"{name!r} is not served: {why}; remove it",
                    code="unsupported_parameter",
                    param=name,
                )
        selected = {name: value for name, value in data.items() if name in self.allowed}
        _check_sizes(selected)
        if self.prompt_field == "messages":
            _check_messages(selected.get("messages"))
        elif selected.get("echo") and selected.get("logprobs") is not None:
            raise ApiError(
                400,
                "'echo' with 'logprobs' is not served: it asks for the logprobs of the prompt; "
                "remove one of them",
                code="unsupported_parameter",
                param="echo",
            )
        _check_choices(selected, max_choices)
        return selected

    def json_schema(self) -> dict[str, Any]:
        """The top level of the request body, for OpenAPI."""
        names = sorted(self.allowed | self.ignored)
        return {
            "type": "object",
            "required": [self.prompt_field],
            "properties": {name: {} for name in names},
            "additionalProperties": False,
        }


def num_prompts(prompt: Any) -> int:
    """How many prompts the `prompt` of a completion request holds: text, tokens, or a list."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        got = "none" if messages is None or messages == [] else f"a {type(messages).__name__}"
        raise ApiError(
            400,
            f"got {got}, expected a non-empty list of messages",
            code="invalid_value",
            param="messages",
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ApiError(
                400,
                f"got a {type(message).__name__}, expected an object with role and content",
                code="invalid_value",
                param=f"messages.{i}",
            )
        if (role := message.get("role")) not in _ROLES:
            raise ApiError(
                400,
                f"got role {role!r}, expected one of {', '.join(_ROLES)}",
                code="invalid_value",
                param=f"messages.{i}.role",
            )
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _TEXT_PARTS:
                raise ApiError(
                    400,
                    f"got a content part of type {kind!r}, expected 'text': the breaker is "
                    "calibrated on text; send text",
                    code="unsupported_value",
                    param=f"messages.{i}.content",
                )


def _check_sizes(selected: Mapping[str, Any]) -> None:
    """Keeps out what a grammar compiler or a stop-string search would chew on for seconds."""
    for name, max_chars in _MAX_CHARS.items():
        if (size := len(json.dumps(selected.get(name)))) > max_chars:
            raise ApiError(
                400,
                f"{name!r} has {size} characters, expected at most {max_chars}; send a smaller one",
                code="invalid_value",
                param=name,
            )
    grammar = selected.get("structured_outputs")
    choices = grammar.get("choice") if isinstance(grammar, dict) else None
    if isinstance(choices, list) and len(choices) > _MAX_GRAMMAR_CHOICES:
        raise ApiError(
            400,
            f"got {len(choices)} choices, expected at most {_MAX_GRAMMAR_CHOICES}; send fewer",
            code="invalid_value",
            param="structured_outputs",
        )


def _check_choices(selected: dict[str, Any], max_choices: int) -> None:
    n = selected.get("n")
    if n is None:
        n = 1
        selected.pop("n", None)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ApiError(
            400, f"got n = {n!r}, expected an integer from 1", code="invalid_value", param="n"
        )
    if (asked := n * num_prompts(selected.get("prompt"))) > max_choices:
        raise ApiError(
            400,
            f"got {asked} completions in one request, expected at most {max_choices}; send "
            "several requests, or raise --max-choices on the server",
            code="invalid_value",
            param="n",
        )


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
    allowed=_SHARED_ALLOWED | {"echo", "prompt", "suffix"},
    ignored=_SHARED_IGNORED,
    refused=_SHARED_REFUSED
    | {
        "add_special_tokens": ("a prompt always starts as the model was trained", (None, True)),
        "best_of": (_BEAM, (None, 1)),
        "prompt_embeds": ("the breaker reads tokens", (None,)),
    },
)
