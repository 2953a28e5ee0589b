"""Which engines the guard was tested on; everything else is refused, loudly."""

from __future__ import annotations

from typing import Any

from circuit_breakers.errors import UnsupportedEngineError

__all__ = [
    "TESTED_VLLM",
    "check_engine_config",
    "check_scheduler",
    "check_vllm_version",
    "decoder_layers",
]

TESTED_VLLM = ("0.31", "0.32")
"""Release series (major.minor) whose internals the plugin was tested against."""

_TESTED_DRAFTERS = ("ngram",)

_LAYER_PATHS = (
    "model.layers",  # Llama, Qwen, Mistral, Gemma, Phi, ...
    "transformer.h",  # GPT-2
    "language_model.model.layers",  # text part of multimodal models
    "model.decoder.layers",  # OPT
)


def check_vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        UnsupportedEngineError: the version is outside the tested range.
    """
    import vllm

    version: str = vllm.__version__
    if not any(version == s or version.startswith(s + ".") for s in TESTED_VLLM):
        tested = ", ".join(f"{s}.x" for s in TESTED_VLLM)
        raise UnsupportedEngineError(
            f"vLLM {version} is not supported; tested: {tested}. Install a tested release, "
            "since the guard reads vLLM's internals and would otherwise fail open"
        )
    return version


def check_engine_config(vllm_config: Any) -> None:
    """Refuses engine modes in which a token's score could be missing or late.

    Raises:
        UnsupportedEngineError: naming every such mode.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    method = None if speculative is None else speculative.method
    pipelined = parallel.pipeline_parallel_size > 1
    unsupported = {
        f"speculative decoding by {method!r} (tested: {', '.join(_TESTED_DRAFTERS)})": (
            method is not None and method not in _TESTED_DRAFTERS
        ),
        "speculative decoding with async scheduling (pass --no-async-scheduling)": (
            method is not None and bool(scheduler.async_scheduling)
        ),
        "KV transfer (disaggregated serving)": vllm_config.kv_transfer_config is not None,
        "pipeline parallelism on model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": (
            pipelined and bool(vllm_config.use_v2_model_runner)
        ),
        "dual batch overlap": bool(parallel.use_ubatching),
        "context parallelism": max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        )
        > 1,
        # Gone in 0.32.
        "sequence parallelism": bool(
            getattr(vllm_config.compilation_config.pass_config, "enable_sp", False)
        ),
        f"scheduler class {scheduler.scheduler_cls!r}": scheduler.scheduler_cls is not None,
        "a diffusion model": bool(vllm_config.model_config.is_diffusion),
        "a pooling model": vllm_config.model_config.runner_type != "generate",
    }
    got = [name for name, on in unsupported.items() if on]
    if got:
        raise UnsupportedEngineError(
            f"the guard is not tested with: {', '.join(got)}; expected none of them; "
            "start the engine without"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler that another plugin has put in place of vLLM's.

    Raises:
        UnsupportedEngineError: naming its class.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    if type(scheduler) not in (Scheduler, AsyncScheduler):
        name = f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"
        raise UnsupportedEngineError(
            f"got scheduler {name}, expected vLLM's own; take the plugin that brings it out of "
            "VLLM_PLUGINS, since what it does with scored tokens is unknown"
        )


def decoder_layers(model: Any) -> Any:
    """The ModuleList of decoder blocks of a vLLM model.

    Raises:
        UnsupportedEngineError: no known path leads to them.
    """
    for path in _LAYER_PATHS:
        node = model
        for part in path.split("."):
            node = getattr(node, part, None)
            if node is None:
                break
        if node is not None:
            return node
    raise UnsupportedEngineError(
        f"no decoder blocks found in {type(model).__name__}; looked at {', '.join(_LAYER_PATHS)}; "
        "this architecture is not supported"
    )
