"""vLLM's own serving classes around the GuardedEngine; the one API module that names vLLM.

They do the OpenAI work: templates, sampling parameters, streaming, tools, structured output. They
get the request's fields and nothing of its headers, which in vLLM can set priority, rank and ids.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError

from circuit_breakers.api.accounting import Usage
from circuit_breakers.api.errors import ApiError, from_vllm_error
from circuit_breakers.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, num_prompts
from circuit_breakers.api.responses import StreamShape
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.errors import ConfigError

__all__ = ["Call", "Endpoint", "Serving", "check_tool_call_parser", "start_serving"]

Endpoint = Literal["chat", "completion"]

_FIELDS = {"chat": CHAT_FIELDS, "completion": COMPLETION_FIELDS}
_MODELS = {"chat": ChatCompletionRequest, "completion": CompletionRequest}
_ID_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl"}
_CHUNK_OBJECTS = {"chat": "chat.completion.chunk", "completion": "text_completion"}

_MAX_SHOWN = 3
"""Fields named in one message, and problems named for one field."""
_TYPE_NAMES = frozenset({"bool", "dict", "float", "int", "list", "none", "str"})
"""Parts of a pydantic location that name a branch of a union, not a field."""


class Call:
    """One parsed request on its way through a serving class."""

    def __init__(self, endpoint: Endpoint, request: Any, model_name: str) -> None:
        self._endpoint = endpoint
        self.request = request
        self.streams: bool = bool(request.stream)
        self.num_prompts = num_prompts(request.prompt) if endpoint == "completion" else 1
        self._n: int = request.n or 1
        # A request without the client's headers, to which vLLM reports the usage.
        self.blank_request = Request({"type": "http", "headers": []})
        self.shape = StreamShape(
            id=f"{_ID_PREFIXES[endpoint]}-{request.request_id}",
            object=_CHUNK_OBJECTS[endpoint],
            model=model_name,
            num_choices=self.num_prompts * self._n,
        )

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    @property
    def prompt_field(self) -> str:
        return _FIELDS[self._endpoint].prompt_field

    def prompt_of(self, choice: int) -> int:
        """Number of the prompt that a choice belongs to."""
        return choice // self._n

    def usage(self) -> Usage | None:
        """What was delivered; None before the response is complete."""
        metadata = getattr(self.blank_request.state, "request_metadata", None)
        usage = metadata.final_usage_info if metadata is not None else None
        if usage is None:
            return None
        return Usage(
            num_prompt_tokens=usage.prompt_tokens * self._n,
            num_completion_tokens=usage.completion_tokens or 0,
        )


class Serving:
    """The serving classes of one live engine."""

    def __init__(self, guarded: GuardedEngine, state: State) -> None:
        self.guarded = guarded
        self._state = state
        self.model_name: str = state.openai_serving_models.base_model_paths[0].name
        self._parses_tools = guarded.vllm_args.tool_call_parser is not None
        self._on_cpu = guarded.vllm_config.device_config.device_type == "cpu"

    @property
    def max_model_len(self) -> int:
        length: int = self.guarded.model_config.max_model_len
        return length

    def parse(self, endpoint: Endpoint, data: dict[str, Any], *, max_choices: int) -> Call:
        """A request, checked against the closed list of fields and vLLM's own model.

        Raises:
            ApiError: 400, naming the field.
        """
        selected = _FIELDS[endpoint].select(data, max_choices=max_choices)
        self._check_seed(selected)
        self._check_tools(selected)
        try:
            request = _MODELS[endpoint].model_validate(selected)
        except ValidationError as e:
            raise _invalid_fields(e) from e
        except VLLMError as e:
            raise self.translate(e) from e
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            # vLLM's validators look into values before their types are checked.
            raise ApiError(400, f"a field has the wrong type: {e}", code="invalid_value") from e
        named = request.model in self.guarded.loras
        return Call(endpoint, request, request.model if named else self.model_name)

    async def start(self, call: Call) -> dict[str, Any] | AsyncGenerator[str, None]:
        """A whole response as JSON, or the events of a stream.

        Raises:
            ApiError: the request cannot be served.
        """
        try:
            if call.endpoint == "chat":
                result = await self._state.openai_serving_chat.create_chat_completion(
                    call.request, call.blank_request
                )
            else:
                result = await self._state.openai_serving_completion.create_completion(
                    call.request, call.blank_request
                )
        except (VLLMError, EngineDeadError, NotImplementedError, TypeError, ValueError) as e:
            raise self.translate(e) from e
        if isinstance(result, ErrorResponse):
            raise from_vllm_error(result.error.model_dump())
        if isinstance(result, AsyncGenerator):
            return result
        body: dict[str, Any] = result.model_dump(mode="json")
        return body

    def translate(self, error: Exception) -> ApiError:
        """An exception of vLLM's as the error that the client gets."""
        if isinstance(error, EngineDeadError) or self.guarded.errored:
            return ApiError(503, "the engine died; restart the server", code="engine_dead")
        return from_vllm_error(create_error_response(error).error.model_dump())

    def _check_seed(self, selected: Mapping[str, Any]) -> None:
        # Seeded sampling of a chunked prompt ends the whole engine on the CPU backend.
        if self._on_cpu and selected.get("seed") is not None and selected.get("temperature") != 0:
            raise ApiError(
                400,
                "'seed' with a temperature above 0 is not served on a CPU; remove it, or set "
                "'temperature' to 0, which needs no seed",
                code="unsupported_parameter",
                param="seed",
            )

    def _check_tools(self, selected: Mapping[str, Any]) -> None:
        # "none" only shows the tools to the model.
        if (
            selected.get("tools")
            and selected.get("tool_choice") != "none"
            and not self._parses_tools
        ):
            raise ApiError(
                400,
                "tool calls are not served by this server; remove 'tools', or start it with "
                "--tool-call-parser",
                code="unsupported_parameter",
                param="tools",
            )


def check_tool_call_parser(name: str | None) -> None:
    """Passes for a parser that vLLM has.

    Raises:
        ConfigError: naming those that it has.
    """
    known = ToolParserManager.list_registered()
    if name is not None and name not in known:
        raise ConfigError(
            f"got --tool-call-parser {name!r}, expected one of {', '.join(sorted(known))}"
        )


async def start_serving(guarded: GuardedEngine, tool_call_parser: str | None = None) -> Serving:
    """vLLM's serving classes with the guarded engine as their engine client."""
    guarded.vllm_args.tool_call_parser = tool_call_parser
    guarded.vllm_args.enable_auto_tool_choice = tool_call_parser is not None
    state = State()
    await init_app_state(
        guarded,
        state,
        guarded.vllm_args,
        await guarded.get_supported_tasks(),
    )
    state.openai_serving_models.lora_requests.update(guarded.loras)
    return Serving(guarded, state)


def _invalid_fields(error: ValidationError) -> ApiError:
    by_field: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        messages = by_field.setdefault(_field_path(problem["loc"]), [])
        # One for each branch of a union.
        if len(messages) < _MAX_SHOWN and problem["msg"] not in messages:
            messages.append(problem["msg"])
    shown = list(by_field.items())[:_MAX_SHOWN]
    listed = "; ".join(f"{name}: {', or '.join(messages)}" for name, messages in shown)
    return ApiError(400, f"invalid fields: {listed}", code="invalid_value", param=shown[0][0])


def _field_path(location: tuple[int | str, ...]) -> str:
    parts = [
        str(part)
        for part in location
        if isinstance(part, int) or (re.fullmatch(r"[a-z_]+", part) and part not in _TYPE_NAMES)
    ]
    return ".".join(parts) or "body"
