"""Starts vLLM with the breaker inside, and hands it out only when the guard is proven live."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.compat import check_engine_config, check_vllm_version
from circuit_breakers.engine.config import ADAPTER_NAME, AdapterKind, EngineGuardConfig
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import (
    BreakerMismatchError,
    ConfigError,
    NotReadyError,
    UnsupportedEngineError,
)
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.operating_point import probes_at
from circuit_breakers.hardware import load_dtype
from circuit_breakers.models import ResolvedModel

__all__ = [
    "WORKER_EXTENSION",
    "EngineSettings",
    "engine_arguments",
    "guard_arguments",
    "guarded_engine",
    "launch_engine",
]

logger = logging.getLogger(__name__)

_VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
WORKER_EXTENSION = "circuit_breakers.engine.worker.BreakerWorkerExtension"


class EngineSettings(BaseModel):
    """How the engine runs. None leaves the choice to vLLM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = "enforce"
    adapter: AdapterKind = "merged"
    """merged: into the weights, free at run time. dynamic: vLLM's LoRA, slower."""
    target_fpr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of benign conversations that may trip, at most; None takes the breaker's own."""
    loras: dict[str, Path] = {}
    """LoRA directories on top of the merged breaker, by the name that clients ask for."""
    dtype: str = "auto"
    """auto: the checkpoint's, or float32 where that is quicker (hardware.py)."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and completion."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Ranks that share the stack of layers."""
    data_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Whole engines behind one server."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 2
    """KV cache on the CPU; a GPU sizes its own."""
    enforce_eager: bool = True
    """No torch.compile: starts in seconds instead of minutes, runs a fifth slower on a CPU."""
    seed: int = 0
    served_name: str
    """Name that clients put into `model`."""


def engine_arguments(
    settings: EngineSettings, model: ResolvedModel, breaker: Breaker
) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs for a guarded engine; merges the adapter if needed."""
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }
    return {
        **guard_arguments(
            model,
            breaker,
            mode=settings.mode,
            adapter=settings.adapter,
            target_fpr=settings.target_fpr,
        ),
        **_lora_arguments(settings),
        "served_model_name": [settings.served_name],
        "dtype": load_dtype(settings.dtype),
        "enforce_eager": settings.enforce_eager,
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        **{name: value for name, value in optional.items() if value is not None},
    }


def guard_arguments(
    model: ResolvedModel,
    breaker: Breaker,
    *,
    mode: Mode,
    adapter: AdapterKind,
    target_fpr: float | None = None,
) -> dict[str, Any]:
    """The keyword arguments of vLLM's EngineArgs that make an engine a guarded one.

    Merges the adapter into the weights where `adapter` says so.

    Raises:
        CalibrationError: the breaker's data does not support `target_fpr`.
        ConfigError: a dynamic adapter would leave the breaker's own chat template out.
    """
    probes_at(breaker.manifest, target_fpr)
    merged = adapter == "merged"
    if not merged and breaker.chat_template is not None:
        raise ConfigError(
            f"got adapter {adapter!r} for breaker {breaker.manifest.name!r}, which has a chat "
            "template of its own, expected 'merged': a dynamic adapter runs with the base model's "
            "tokenizer; merge the breaker"
        )
    guard = EngineGuardConfig(
        breaker_path=str(breaker.path.resolve()),
        breaker_digest=breaker.digest,
        mode=mode,
        adapter=adapter,
        target_fpr=target_fpr,
    )
    arguments: dict[str, Any] = {
        "model": str(merged_checkpoint(model, breaker) if merged else model.path),
        "worker_extension_cls": WORKER_EXTENSION,
        "additional_config": guard.to_additional_config(),
        # No sampling defaults from the checkpoint: a client's request means what it says.
        "generation_config": "vllm",
        # Raw logprobs would show tokens that the request itself rules out, next to each one given.
        "logprobs_mode": "processed_logprobs",
    }
    if not merged:
        rank = _lora_rank(breaker.adapter_dir)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return arguments


def _lora_arguments(settings: EngineSettings) -> dict[str, Any]:
    if not settings.loras:
        return {}
    if settings.adapter == "dynamic":
        raise ConfigError(
            f"got LoRAs {', '.join(settings.loras)} with adapter 'dynamic', expected 'merged': a "
            "request has one LoRA, and that would be the breaker's; merge the breaker"
        )
    for name, path in settings.loras.items():
        if name in (settings.served_name, ADAPTER_NAME):
            raise ConfigError(f"got LoRA name {name!r}, which is taken; give it another name")
        missing = [
            file
            for file in ("adapter_config.json", "adapter_model.safetensors")
            if not (path / file).is_file()
        ]
        if missing:
            raise ConfigError(
                f"LoRA {name!r}: no {' and no '.join(missing)} in {path}, expected a PEFT adapter "
                "in safetensors; save it with save_pretrained"
            )
    ranks = [_lora_rank(path) for path in settings.loras.values()]
    return {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": max(ranks)}


@asynccontextmanager
async def launch_engine(
    settings: EngineSettings, model: ResolvedModel, breaker: Breaker
) -> AsyncIterator[GuardedEngine]:
    """A running guarded engine; shut down on exit.

    Raises:
        BreakerMismatchError: the breaker was made for another model.
        CalibrationError: its data does not support the promise that was asked for.
        UnsupportedEngineError: vLLM's version or mode is outside the tested range.
        NotReadyError: a worker does not run the breaker's probes.
    """
    breaker.check_fits(model.spec())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # As in vLLM's own server: a fork would inherit the port, and keep it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    check_vllm_version()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = await asyncio.to_thread(engine_arguments, settings, model, breaker)
    vllm_args = _serving_namespace(arguments)
    vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    check_engine_config(vllm_config)
    # The constructor blocks until the engine core is up; the event loop must keep answering.
    engine = await asyncio.to_thread(AsyncLLM.from_vllm_config, vllm_config)
    try:
        loras = await _load_loras(engine, settings)
        yield await guarded_engine(
            engine,
            breaker,
            settings.mode,
            settings.adapter,
            vllm_args,
            loras,
            settings.target_fpr,
        )
    finally:
        engine.shutdown()


async def _load_loras(engine: Any, settings: EngineSettings) -> dict[str, Any]:
    """The operator's LoRAs, loaded in the workers, by name."""
    from vllm.lora.request import LoRARequest

    loras = {
        name: LoRARequest(name, number, str(path))
        for number, (name, path) in enumerate(settings.loras.items(), start=2)
    }
    for name, lora in loras.items():
        try:
            await engine.add_lora(lora)
        except Exception as e:
            raise ConfigError(
                f"LoRA {name!r} does not load: {e}; expected an adapter made for this model"
            ) from e
    return loras


async def guarded_engine(
    engine: Any,
    breaker: Breaker,
    mode: Mode,
    adapter: AdapterKind,
    vllm_args: Any,
    loras: Mapping[str, Any] = MappingProxyType({}),
    target_fpr: float | None = None,
) -> GuardedEngine:
    """A live engine client behind the guard, once each of its workers runs the breaker's probes.

    Args:
        loras: LoRARequests that a client may ask for, by name; with a merged breaker only.
        target_fpr: as the engine was started with.
    Raises:
        NotReadyError: a worker does not.
    """
    from vllm.lora.request import LoRARequest

    digests = await _digests(engine)
    if not digests or any(digest != breaker.digest for digest in digests):
        raise NotReadyError(
            f"workers run probes {digests}, expected {breaker.digest} in each; "
            "is the plugin 'circuit_breakers' kept out by VLLM_PLUGINS?"
        )
    lora_request = None
    if adapter == "dynamic":
        lora_request = LoRARequest(ADAPTER_NAME, 1, str(breaker.adapter_dir))
    return GuardedEngine(engine, breaker, mode, lora_request, vllm_args, loras, target_fpr)


async def _digests(engine: Any) -> list[str | None]:
    """What each worker of each engine says it runs."""
    if engine.vllm_config.parallel_config.data_parallel_size == 1:
        return list(await engine.collective_rpc("circuit_breaker_digest"))
    # Of several engines, collective_rpc gives the answer of the first.
    ask_all = getattr(engine.engine_core, "call_utility_all_async", None)
    if ask_all is None:
        raise UnsupportedEngineError(
            "data parallelism needs vLLM 0.32 or newer, where every engine can be asked for its "
            "probes; start with data_parallel_size 1"
        )
    answers = await ask_all("collective_rpc", "circuit_breaker_digest", None, (), None)
    return [digest for answer in answers for digest in answer]


def _serving_namespace(arguments: dict[str, Any]) -> Any:
    """vLLM's own command-line namespace, for its serving classes, with our engine arguments."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for name, value in arguments.items():
        setattr(namespace, name, value)
    validate_parsed_serve_args(namespace)
    return namespace


def _lora_rank(adapter_dir: Path) -> int:
    """The smallest rank that vLLM has room for and the adapter fits in."""
    config = json.loads((adapter_dir / "adapter_config.json").read_bytes())
    fitting = [rank for rank in _VLLM_LORA_RANKS if rank >= config["r"]]
    if not fitting:
        raise BreakerMismatchError(
            f"adapter {adapter_dir} has rank {config['r']}, vLLM's LoRA allows at most "
            f"{_VLLM_LORA_RANKS[-1]}; merge it into the weights"
        )
    return fitting[0]
