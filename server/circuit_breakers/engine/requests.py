"""Requests that reach the engine client by vLLM's own routes: what could get around the guard.

Our own routes let a closed list of fields through (api/fields.py); vLLM's let nearly everything.
So the same is refused once more where all requests of an API process pass: AsyncLLM.add_request,
and the start of a beam search, online and offline. An LLM object in a program of the operator's
own may set any other parameter.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from circuit_breakers.engine.config import EngineGuardConfig
from circuit_breakers.engine.request_policy import OwnArgs
from circuit_breakers.errors import ConfigError

__all__ = ["check_prompt", "check_sampling_params", "control_token_ids", "install"]

_LEFT_OUT = (None, False)
_UNSCORED_END = "where it ends a completion, it tells of a token that has no score"
_BEFORE_VERDICT = "it would tell of a prompt before the verdict"

# Parameter -> (values that are the same as leaving it out, why no other one is served).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "extra_args": ((None, {}), "it belongs to the engine's own plumbing"),
    "include_stop_str_in_output": (_LEFT_OUT, "a stop string would leave before it is scored"),
    "prompt_logprobs": ((None,), _BEFORE_VERDICT),
    "prompt_logprob_token_ids": ((None,), _BEFORE_VERDICT),
    "repetition_detection": ((None,), _UNSCORED_END),
    "trace_decode_token_ids": ((None, []), "it puts tokens in the place of sampled ones"),
}

_TEXT_PROMPT = "token"
"""Type of a rendered prompt that is tokens alone."""


def check_sampling_params(
    params: Any, *, control_token_ids: frozenset[int] = frozenset(), on_cpu: bool = False
) -> None:
    """Passes for sampling parameters under which no unscored token shows.

    Args:
        control_token_ids: tokens that end a turn and say nothing; they may be stop tokens.
    Raises:
        ConfigError: naming the parameter.
    """
    if not hasattr(params, "stop_token_ids"):
        raise ConfigError(
            f"got {type(params).__name__}, expected SamplingParams: the guard judges generation; "
            "send pooling requests to a server without a breaker"
        )
    for name, (neutral, why) in _REFUSED.items():
        value = getattr(params, name)
        if name == "extra_args" and type(value) is OwnArgs:
            continue
        if not any(type(value) is type(v) and value == v for v in neutral):
            raise ConfigError(f"got {name}, expected none: {why}; remove it")
    if set(params.stop_token_ids or ()) - control_token_ids:
        raise ConfigError(f"got stop_token_ids, expected none: {_UNSCORED_END}; use stop strings")
    # Seeded sampling of a chunked prompt ends the whole engine on the CPU backend.
    if on_cpu and params.seed is not None and params.temperature > 0:
        raise ConfigError(
            "got seed with a temperature above 0, expected none on a CPU; remove it, or set "
            "temperature to 0, which needs no seed"
        )


def check_prompt(prompt: Any) -> None:
    """Passes for a prompt that is text or tokens, all of it at once.

    Raises:
        ConfigError: it is something else.
    """
    kind = "text"
    if isinstance(prompt, dict):
        kind = prompt.get("type", _TEXT_PROMPT)
        if prompt.get("multi_modal_data"):
            kind = "multimodal"
        elif prompt.get("prompt_embeds") is not None:
            kind = "embeds"
    elif not isinstance(prompt, str | list):
        kind = type(prompt).__name__
    if kind not in ("text", _TEXT_PROMPT):
        raise ConfigError(
            f"got a prompt of kind {kind!r}, expected text or tokens: the breaker is calibrated "
            "on text; send text"
        )


def control_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that a tokenizer marks as special: ends of turns, roles, padding."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(number for number, token in added.items() if token.special)


def install() -> None:
    """Wraps vLLM's engine client and the entry of its beam searches."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    add_request = AsyncLLM.add_request
    # Not in 0.31, whose own server is not guarded for want of it (dropin.py).
    resolve_watermarking = getattr(InputProcessor, "resolve_watermarking", None)

    @wraps(add_request)
    async def guarded_add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if EngineGuardConfig.from_vllm_config(self.vllm_config) is not None:
            try:
                check_prompt(prompt)
                check_sampling_params(
                    params,
                    control_token_ids=_control_token_ids_of(self),
                    on_cpu=self.vllm_config.device_config.device_type == "cpu",
                )
            except ConfigError as e:
                # vLLM's routes answer this one with 400, any other with 500.
                raise VLLMValidationError(str(e)) from e
        return await add_request(self, request_id, prompt, params, *args, **kwargs)

    def guarded_resolve_watermarking(self: Any, params: Any) -> Any:
        # The one call that every beam search makes of the engine before it starts.
        if (
            isinstance(params, BeamSearchParams)
            and EngineGuardConfig.from_vllm_config(self.vllm_config) is not None
        ):
            raise VLLMValidationError(
                "got a beam search, expected sampling: beam search feeds its beams back as "
                "prompts, past the verdict; leave use_beam_search out"
            )
        assert resolve_watermarking is not None, "wrapped only where it is there"
        return resolve_watermarking(self, params)

    AsyncLLM.add_request = guarded_add_request
    if resolve_watermarking is not None:
        InputProcessor.resolve_watermarking = guarded_resolve_watermarking


def _control_token_ids_of(engine: Any) -> frozenset[int]:
    tokenizer = engine.input_processor.tokenizer
    cached: frozenset[int] | None = engine.__dict__.get("_circuit_breakers_control_tokens")
    if cached is None:
        cached = control_token_ids(tokenizer)
        engine.__dict__["_circuit_breakers_control_tokens"] = cached
    return cached
