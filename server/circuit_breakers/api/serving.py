"""vLLM's own serving classes around the GuardedEngine; the one API module that names vLLM.

They do the OpenAI work: templates, sampling parameters, streaming, tools, structured output. They
get the request's fields and nothing of its headers, which in vLLM can set priority, rank and ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

from fastapi import Request
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import State
from vllm.entrypoints.anthropic.protocol import (
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
)
from vllm.entrypoints.openai.responses.protocol import (
    ResponsesRequest,
    ResponsesResponse,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError

from circuit_breakers.api.accounting import Usage
from circuit_breakers.api.annotations import Annotator
from circuit_breakers.api.endpoints import ENDPOINTS, Endpoint
from circuit_breakers.api.errors import (
    ApiError,
    engine_dead,
    from_validation_error,
    from_vllm_error,
)
from circuit_breakers.api.formats import Format
from circuit_breakers.api.prompts import num_prompts
from circuit_breakers.api.responses import StreamShape
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.engine.session import GuardSession, current_session
from circuit_breakers.errors import ConfigError

__all__ = [
    "REQUEST_MODELS",
    "Call",
    "Serving",
    "answer_schemas",
    "check_tool_call_parser",
    "start_serving",
]

REQUEST_MODELS = {
    "chat": ChatCompletionRequest,
    "completion": CompletionRequest,
    "response": ResponsesRequest,
    "message": AnthropicMessagesRequest,
}
_ANSWER_MODELS: dict[Endpoint, Any] = {
    "chat": ChatCompletionResponse,
    "completion": CompletionResponse,
    "response": ResponsesResponse,
    "message": AnthropicMessagesResponse,
}
# Endpoint -> (attribute of vLLM's state, method of the serving class there).
_HANDLERS = {
    "chat": ("openai_serving_chat", "create_chat_completion"),
    "completion": ("openai_serving_completion", "create_completion"),
    "response": ("openai_serving_responses", "create_responses"),
    "message": ("anthropic_serving_messages", "create_messages"),
}


class Call:
    """One parsed request on its way through a serving class."""

    def __init__(self, endpoint: Endpoint, request: Any, model_name: str) -> None:
        self.endpoint = endpoint
        self.request = request
        self.streams: bool = bool(request.stream)
        self.num_prompts = num_prompts(request.prompt) if endpoint == "completion" else 1
        self.choices_per_prompt: int = getattr(request, "n", None) or 1
        # A request without the client's headers, to which vLLM reports the usage.
        self.blank_request = Request({"type": "http", "headers": []})
        spec = ENDPOINTS[endpoint]
        self.shape = StreamShape(
            id=f"{spec.id_prefix}{getattr(request, 'request_id', '')}",
            object=spec.chunk_object,
            model=model_name,
            num_choices=self.num_prompts * self.choices_per_prompt,
        )
        self.annotators: tuple[Annotator, ...] = ()
        self.final_usage: dict[str, Any] | None = None
        """What the last event of a response says was read and written."""

    @property
    def format(self) -> Format:
        return ENDPOINTS[self.endpoint].format

    @property
    def prompt_field(self) -> str:
        return ENDPOINTS[self.endpoint].rules.prompt_field

    def prompts_of(self, choices: set[int]) -> set[int]:
        """Numbers of the prompts that choices belong to."""
        return {choice // self.choices_per_prompt for choice in choices}

    def ask_engine(self, number: int) -> None:
        """Has that engine answer, where there are several; vLLM would take the least loaded one."""
        header = (b"x-data-parallel-rank", str(number).encode())
        self.blank_request = Request({"type": "http", "headers": [header]})

    def usage(self) -> Usage | None:
        """What was delivered; None before the response is complete."""
        if self.final_usage is not None:
            return Usage(
                num_prompt_tokens=self.final_usage["input_tokens"],
                num_completion_tokens=self.final_usage["output_tokens"],
            )
        metadata = getattr(self.blank_request.state, "request_metadata", None)
        usage = metadata.final_usage_info if metadata is not None else None
        if usage is None:
            return None
        return Usage(
            num_prompt_tokens=usage.prompt_tokens * self.choices_per_prompt,
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
    def breaker_name(self) -> str:
        """The name that clients pass as moderation model."""
        name: str = self.guarded.breaker.manifest.name
        return name

    @property
    def num_engines(self) -> int:
        """Whole engines behind this server, by data parallelism; not those of its neighbours."""
        parallel = self.guarded.vllm_config.parallel_config
        number: int = (
            parallel.data_parallel_size_local
            if parallel.local_engines_only
            else parallel.data_parallel_size
        )
        return number

    @property
    def max_model_len(self) -> int:
        length: int = self.guarded.model_config.max_model_len
        return length

    def parse(self, endpoint: Endpoint, data: dict[str, Any], *, max_choices: int) -> Call:
        """A request, checked against the closed list of fields and vLLM's own model.

        Raises:
            ApiError: 400, naming the field.
        """
        selected = ENDPOINTS[endpoint].rules.select(data, max_choices=max_choices)
        if endpoint == "response":
            # vLLM would keep it in memory for good, for anyone to read who knows its id.
            selected["store"] = False
        self._check_seed(selected)
        self._check_tools(selected)
        try:
            request = REQUEST_MODELS[endpoint].model_validate(selected)
        except ValidationError as e:
            raise from_validation_error(e) from e
        except VLLMError as e:
            raise self.translate(e) from e
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            # vLLM's validators look into values before their types are checked.
            raise ApiError(400, f"a field has the wrong type: {e}", code="invalid_value") from e
        named = request.model in self.guarded.loras
        return Call(endpoint, request, request.model if named else self.model_name)

    @property
    def tokenizer(self) -> Any:
        return self.guarded.input_processor.tokenizer

    def ends_at_once(self) -> dict[str, Any]:
        """Fields of a request that ends with its prefill; without an end of turn, a step later."""
        end: int | None = self.tokenizer.eos_token_id
        return {} if end is None else {"allowed_token_ids": [end]}

    async def start(self, call: Call) -> dict[str, Any] | AsyncGenerator[str, None]:
        """A whole response as JSON, or the events of a stream.

        Raises:
            ApiError: the request cannot be served.
        """
        name, method = _HANDLERS[call.endpoint]
        create = getattr(getattr(self._state, name), method)
        try:
            result = await create(call.request, call.blank_request)
        except (VLLMError, EngineDeadError, NotImplementedError, TypeError, ValueError) as e:
            raise self.translate(e) from e
        if isinstance(result, ErrorResponse):
            raise from_vllm_error(result.error.model_dump())
        if isinstance(result, AsyncGenerator):
            return self._events(call, result, current_session())
        # Anthropic's clients know no null fields.
        body: dict[str, Any] = result.model_dump(
            mode="json", by_alias=True, exclude_none=call.endpoint == "message"
        )
        return body

    async def _events(
        self, call: Call, source: AsyncGenerator[Any, None], session: GuardSession | None
    ) -> AsyncGenerator[str, None]:
        """The events of a stream as text; whatever breaks it off is raised, as an ApiError."""
        try:
            async for event in source:
                if not isinstance(event, str):
                    event = f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"
                if call.format.is_error(event):
                    raise self._error_in(call, event, session)
                yield event
        except ApiError:
            raise
        except Exception as e:
            raise self.translate(e) from e
        finally:
            await source.aclose()

    def _error_in(self, call: Call, event: str, session: GuardSession | None) -> ApiError:
        # vLLM tells of it as of any error of its own.
        if self.guarded.errored:
            return engine_dead()
        if (told := call.format.error_in(event)) is not None:
            return told
        if session is not None and session.error is not None:
            return self.translate(session.error)
        return ApiError(500, "the answer broke off; send the request again", code="internal_error")

    def translate(self, error: Exception) -> ApiError:
        """An exception of vLLM's as the error that the client gets."""
        if isinstance(error, EngineDeadError) or self.guarded.errored:
            return engine_dead()
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
        off = ("none", {"type": "none"})
        if (
            selected.get("tools")
            and selected.get("tool_choice") not in off
            and not self._parses_tools
        ):
            raise ApiError(
                400,
                "tool calls are not served by this server; remove 'tools', or start it with "
                "--tool-call-parser",
                code="unsupported_parameter",
                param="tools",
            )


def answer_schemas(
    ref_template: str,
) -> tuple[dict[Endpoint, dict[str, Any]], dict[str, Any]]:
    """JSON schemas of whole answers by endpoint, as vLLM gives them, and what they refer to."""
    models: list[tuple[Any, Literal["serialization"]]] = [
        (model, "serialization") for model in _ANSWER_MODELS.values()
    ]
    found, schema = models_json_schema(models, ref_template=ref_template)
    answers: dict[Endpoint, dict[str, Any]] = {
        endpoint: found[model, "serialization"] for endpoint, model in _ANSWER_MODELS.items()
    }
    return answers, schema["$defs"]


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
