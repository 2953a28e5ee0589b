"""Which engines the guard was tested on; everything else is refused, loudly."""

from __future__ import annotations

from typing import Any

from circuit_breakers.errors import UnsupportedEngineError

__all__ = ["TESTED_VLLM", "check_engine_config", "check_vllm_version", "decoder_layers"]

TESTED_VLLM = ("0.32",)
"""Release series (major.minor) whose internals the plugin was tested against."""

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
    unsupported = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV transfer (disaggregated serving)": vllm_config.kv_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "context parallelism": max(
            getattr(parallel, "decode_context_parallel_size", 1),
            getattr(parallel, "prefill_context_parallel_size", 1),
        )
        > 1,
        "async scheduling (pass --no-async-scheduling)": bool(scheduler.async_scheduling),
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": bool(vllm_config.use_v2_model_runner),
        "a custom scheduler class": scheduler.scheduler_cls is not None,
    }
    got = [name for name, on in unsupported.items() if on]
    if got:
        raise UnsupportedEngineError(
            f"the guard is not tested with: {', '.join(got)}; expected none of them; "
            "start the engine without"
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
