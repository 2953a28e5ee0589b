"""The engines of a benchmark: their arguments, and starting them inside this process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.bench.blocks import WORKLOADS, BenchEngine, Workload
from circuit_breakers.engine.config import AdapterKind
from circuit_breakers.engine.launch import EngineSettings, engine_arguments
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import ConfigError
from circuit_breakers.hardware import load_dtype
from circuit_breakers.models import ResolvedModel

__all__ = ["ARMS", "ArmName", "BenchSettings", "Engines", "bench_environment"]

ArmName = Literal["observe", "enforce", "probes", "dynamic", "hidden-states", "guard-model"]
ARMS: tuple[ArmName, ...] = (
    "observe",
    "enforce",
    "probes",
    "dynamic",
    "hidden-states",
    "guard-model",
)
_BREAKER_VARIABLE = "CIRCUIT_BREAKERS_BREAKER"
"""Would put a guard into the plain engines."""
_GIB = 1 << 30


class BenchSettings(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: Annotated[tuple[ArmName, ...], Field(min_length=1)] = ("observe", "enforce")
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)] = tuple(WORKLOADS.values())
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    """Requests at once."""
    num_pairs: Annotated[int, Field(ge=1)] = 8
    num_probes: Annotated[int, Field(ge=2, le=16)] = 16
    """Probes of the arm that is compared with one probe."""
    num_probe_layers: Annotated[int, Field(ge=1, le=16)] = 4
    """Layers that they share."""
    compiled: bool = False
    startup_pairs: Annotated[int, Field(ge=0)] = 0
    """Starts of each kind; 0 leaves them out."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 2
    """Of each engine; two are alive at once at most."""


@contextmanager
def bench_environment() -> Iterator[None]:
    """Engines inside this process, on vLLM's defaults, with no breaker but the ones we name."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }.items():
        os.environ.setdefault(name, value)
    breaker = os.environ.pop(_BREAKER_VARIABLE, None)
    try:
        yield
    finally:
        if breaker is not None:
            os.environ[_BREAKER_VARIABLE] = breaker


class Engines:
    """Starts engines that differ in what is compared and in nothing else."""

    def __init__(self, model: ResolvedModel, settings: BenchSettings) -> None:
        """
        Raises:
            ConfigError: a workload is longer than the model's context.
        """
        self._model = model
        config = json.loads((model.path / "config.json").read_bytes())
        config = config.get("text_config", config)
        self._vocab_size: int = config["vocab_size"]
        # The guard's extra step, and a check of prompt and completion that answers one token.
        longest = max(w.prompt_tokens + w.output_tokens for w in settings.workloads) + 1
        limit = config.get("max_position_embeddings", longest)
        if longest > limit:
            raise ConfigError(
                f"got a workload of {longest - 1} tokens, expected at most {limit - 1} for "
                f"{model.name}; pass --workload PROMPT:OUTPUT"
            )
        self._settings = EngineSettings(
            mode="enforce",
            max_model_len=longest,
            max_num_seqs=max(settings.batches),
            enforce_eager=not settings.compiled,
            served_name=model.name,
        )
        self._common = {
            "kv_cache_memory_bytes": settings.kv_cache_gib * _GIB,
            "disable_log_stats": True,
        }

    def guarded_arguments(
        self, breaker: Breaker, adapter: AdapterKind = "merged"
    ) -> dict[str, Any]:
        """Arguments of vllm.LLM for a guarded engine."""
        settings = self._settings.model_copy(update={"adapter": adapter})
        return engine_arguments(settings, self._model, breaker) | self._common

    def plain_arguments(self, merged: Breaker | None = None) -> dict[str, Any]:
        """Arguments of vllm.LLM without a guard, on the base model, or with an adapter inside."""
        settings = self._settings
        path = self._model.path if merged is None else merged_checkpoint(self._model, merged)
        return {
            "model": str(path),
            "dtype": load_dtype(settings.dtype),
            "enforce_eager": settings.enforce_eager,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "seed": settings.seed,
            "async_scheduling": False,
            "generation_config": "vllm",
            **self._common,
        }

    def start(self, arguments: dict[str, Any]) -> BenchEngine:
        """A live engine; the caller closes it."""
        from vllm import LLM

        return BenchEngine(LLM(**arguments), self._vocab_size)
