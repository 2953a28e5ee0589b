"""The breaker in vLLM's own command line: one variable, or one key of --additional-config.

    CIRCUIT_BREAKERS_BREAKER=/path/to/breaker vllm serve MODEL
    vllm serve MODEL --additional-config '{"circuit_breakers": {"breaker": "/path/to/breaker"}}'

Before vLLM makes its configuration, the short form is replaced by the full one: the merged
checkpoint, the worker extension, and the verified breaker in `additional_config`. All processes of
the engine get the configuration from this one, so nothing else has to travel. Without a breaker
vLLM is left as it is; with one, whatever stands in its way ends the start.
"""

from __future__ import annotations

import logging
import os
from functools import wraps
from importlib.metadata import entry_points
from typing import Any

from circuit_breakers.artifact import load_breaker
from circuit_breakers.engine.breaker_request import (
    BreakerRequest,
    is_full_form,
    requested_breaker,
)
from circuit_breakers.engine.compat import check_engine_config
from circuit_breakers.errors import ConfigError, UnsupportedEngineError
from circuit_breakers.models import ResolvedModel, resolve_model

__all__ = [
    "ENDPOINT_PLUGIN",
    "check_environment",
    "guard_engine_args",
    "install",
]

logger = logging.getLogger("vllm.circuit_breakers")

ENDPOINT_PLUGIN = "circuit_breakers"
"""Name of our entry point in vLLM's group of endpoint plugins."""

_RESOLVED = "_circuit_breakers_model"
_LEFT_OUT: tuple[Any, ...] = (None, "", [], {}, False)

# Argument -> (values that are fine, why no other one is).
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "worker_extension_cls": (
        _LEFT_OUT,
        "the guard's own extension takes that place",
    ),
    # vLLM's default is raw_logprobs; whether somebody asked for it cannot be told.
    "logprobs_mode": (
        ("raw_logprobs", "processed_logprobs"),
        "the guard serves processed_logprobs: raw values show tokens that the request rules out",
    ),
    "generation_config": (
        ("auto", "vllm"),
        "the guard serves without sampling defaults of the checkpoint ('vllm')",
    ),
    "runner": (("auto", "generate"), "the guard judges generation"),
    "convert": (("auto", "none"), "the guard judges generation"),
    "load_format": (
        ("auto", "safetensors"),
        "the checkpoint with the adapter inside is safetensors",
    ),
    "quantization": (_LEFT_OUT, "the thresholds were calibrated on the unquantised weights"),
    "hf_config_path": (_LEFT_OUT, "the breaker belongs to the model's own config"),
    "hf_overrides": (_LEFT_OUT, "the breaker belongs to the model's own config"),
    "enable_prompt_embeds": (_LEFT_OUT, "the breaker reads tokens"),
    "enable_lora": (_LEFT_OUT, "another adapter would change what the probes read"),
}

_FORBIDDEN_SWITCHES = {
    "VLLM_SERVER_DEV_MODE": "its routes change weights and call any method of a worker",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "another adapter would change what the probes read",
    "VLLM_USE_RUST_FRONTEND": "it runs no Python plugin, so its routes would have no guard",
}


def check_environment() -> None:
    """Refuses switches of vLLM's under which the guard could be got around.

    Raises:
        UnsupportedEngineError: naming each one that is on.
    """
    from vllm import envs

    on = [f"{name} ({why})" for name, why in _FORBIDDEN_SWITCHES.items() if getattr(envs, name)]
    if on:
        raise UnsupportedEngineError(
            f"got {', '.join(on)}; expected none of them next to a breaker; unset them"
        )


def guard_engine_args(args: Any, request: BreakerRequest) -> None:
    """Turns vLLM's EngineArgs into those of a guarded engine, in place.

    Raises:
        CircuitBreakersError: an argument contradicts the guard, the breaker does not fit the
            model, or one of them cannot be loaded.
    """
    _check_engine()
    _check_arguments(args)
    model = _resolved(args)
    _check_tokenizer(args, model)
    breaker = load_breaker(request.breaker.expanduser())
    breaker.check_fits(model.spec())
    # Deferred: merging needs torch and peft.
    from circuit_breakers.engine.launch import guard_arguments

    arguments = guard_arguments(
        model,
        breaker,
        mode=request.mode,
        adapter=request.adapter,
        target_fpr=request.target_fpr,
    )
    if args.served_model_name is None:
        args.served_model_name = [_typed_name(args)]
    arguments["additional_config"] = args.additional_config | arguments["additional_config"]
    # The model is a local directory now, and its tokenizer lies in it.
    arguments |= {"tokenizer": None, "revision": None, "tokenizer_revision": None}
    for name, value in arguments.items():
        setattr(args, name, value)
    logger.info(
        "breaker %s (%s) guards %s: mode=%s adapter=%s",
        breaker.manifest.name,
        breaker.digest[:12],
        model.name,
        request.mode,
        request.adapter,
    )


def install() -> None:
    """Wraps vLLM's EngineArgs and its loader of endpoint plugins."""
    from vllm import plugins
    from vllm.engine.arg_utils import EngineArgs

    post_init = EngineArgs.__post_init__
    create_engine_config = EngineArgs.create_engine_config
    load_endpoint_plugins = plugins.load_endpoint_plugins
    guarded_here = False

    @wraps(post_init)
    def guarded_post_init(self: Any) -> None:
        # Offline, vLLM looks any name up on the hub's local cache, where built-in ones are not.
        if not is_full_form(self.additional_config) and requested_breaker(
            self.additional_config, os.environ
        ):
            typed = self.model
            model = resolve_model(typed, revision=self.revision)
            self.model = str(model.path)
            setattr(self, _RESOLVED, (typed, model))
        post_init(self)

    @wraps(create_engine_config)
    def guarded_create(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal guarded_here
        if is_full_form(self.additional_config):
            guarded_here = True
            return create_engine_config(self, *args, **kwargs)
        request = requested_breaker(self.additional_config, os.environ)
        if request is None:
            return create_engine_config(self, *args, **kwargs)
        check_environment()
        guard_engine_args(self, request)
        vllm_config = create_engine_config(self, *args, **kwargs)
        check_engine_config(vllm_config)
        guarded_here = True
        return vllm_config

    @wraps(load_endpoint_plugins)
    def guarded_load(*args: Any, **kwargs: Any) -> list[Any]:
        loaded: list[Any] = load_endpoint_plugins(*args, **kwargs)
        if guarded_here and not any(plugin.name == ENDPOINT_PLUGIN for plugin in loaded):
            # vLLM wants such plugins named in VLLM_PLUGINS. Naming a breaker says as much, and
            # one that cannot be imported must end the start, not be skipped.
            loaded.append(_endpoint_plugin())
            logger.info("endpoint plugin %s: loaded, as a breaker is configured", ENDPOINT_PLUGIN)
        return loaded

    EngineArgs.__post_init__ = guarded_post_init
    EngineArgs.create_engine_config = guarded_create
    plugins.load_endpoint_plugins = guarded_load


def _check_engine() -> None:
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor

    if not hasattr(InputProcessor, "resolve_watermarking"):
        raise UnsupportedEngineError(
            f"got vLLM {vllm.__version__}, expected 0.32 for a breaker in vLLM's own server: in "
            "older ones a beam search cannot be told from other requests; use `circuit-breakers "
            "serve`, or install a newer vLLM"
        )


def _check_arguments(args: Any) -> None:
    for name, (fine, why) in _FIXED.items():
        value = getattr(args, name)
        if not any(type(value) is type(v) and value == v for v in fine):
            raise ConfigError(
                f"got {name} {value!r} next to a breaker, expected it left out: {why}; remove it"
            )
    if not isinstance(args.additional_config, dict):
        raise ConfigError(
            f"got additional_config of type {type(args.additional_config).__name__} next to a "
            "breaker, expected a dict; pass JSON"
        )
    if (count := args._api_process_count) > 1:
        raise UnsupportedEngineError(
            f"got {count} API servers next to a breaker, expected 1: metrics and readiness of the "
            "guard are those of one process; pass --api-server-count 1"
        )


def _check_tokenizer(args: Any, model: ResolvedModel) -> None:
    own = {None, _typed_name(args), args.model, str(model.path)}
    if args.tokenizer not in own:
        raise ConfigError(
            f"got tokenizer {args.tokenizer!r} next to a breaker, expected that of the model: the "
            "breaker is calibrated on its tokens; remove it"
        )


def _resolved(args: Any) -> ResolvedModel:
    _, model = getattr(args, _RESOLVED, (None, None))
    if isinstance(model, ResolvedModel) and str(model.path) == args.model:
        return model
    return resolve_model(args.model, revision=args.revision)


def _typed_name(args: Any) -> str:
    typed, model = getattr(args, _RESOLVED, (None, None))
    if isinstance(model, ResolvedModel) and str(model.path) == args.model:
        assert isinstance(typed, str), "stored together"
        return typed
    name: str = args.model
    return name


def _endpoint_plugin() -> Any:
    """Our endpoint plugin, by its entry point: the engine does not know the API.

    Raises:
        UnsupportedEngineError: the installation has no such entry point.
    """
    found = list(entry_points(group="vllm.endpoint_plugins", name=ENDPOINT_PLUGIN))
    if not found:
        raise UnsupportedEngineError(
            f"the installation has no endpoint plugin {ENDPOINT_PLUGIN!r}, expected one with a "
            "configured breaker; install circuit-breakers again"
        )
    return found[0].load()()
