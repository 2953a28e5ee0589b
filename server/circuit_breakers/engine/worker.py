"""Worker side: the breaker's probes on a loaded model, and their rows on each step's output.

Every model runner of vLLM (V1 and V2, CPU and GPU) has the same three steps, so the runner that a
worker has loaded is wrapped, whichever it is:

    load_model -> probes on the blocks
    execute_model -> buffer blanked, forward pass writes it
    sample_tokens -> rows attached to the output, at once or when an async output is read
"""

from __future__ import annotations

import logging
from functools import wraps
from pathlib import Path
from typing import Any

from circuit_breakers.engine.compat import check_engine_config
from circuit_breakers.engine.config import EngineGuardConfig, check_merged_checkpoint
from circuit_breakers.engine.probes import PendingRows, WorkerProbes, register_op
from circuit_breakers.errors import BreakerMismatchError

__all__ = ["SCORES_ATTRIBUTE", "BreakerWorkerExtension", "install"]

logger = logging.getLogger("vllm.circuit_breakers")

SCORES_ATTRIBUTE = "circuit_breaker_logit_NP"
"""Attribute of a ModelRunnerOutput: float32 (N, P), rows in the order of the flattened batch."""

_PROBES_ATTRIBUTE = "_circuit_breakers"
_RELAY_KEY = "circuit_breaker_logit_NP"
"""Key of IntermediateTensors between pipeline stages."""


class BreakerWorkerExtension:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

    def circuit_breaker_digest(self) -> str | None:
        """Digest of the breaker whose probes are live in this worker; None when there is none."""
        probes: WorkerProbes | None = getattr(self.model_runner, _PROBES_ATTRIBUTE, None)  # type: ignore[attr-defined]
        return None if probes is None or not probes.enabled else probes.digest

    def circuit_breaker_enable(self, on: bool) -> None:
        """Switches the probes, for benchmarks; the scheduler side fails closed on its own."""
        getattr(self.model_runner, _PROBES_ATTRIBUTE).enable(on)  # type: ignore[attr-defined]


def install() -> None:
    """Wraps the workers' load_model. Without a breaker it does nothing more."""
    from vllm.v1.worker.gpu_worker import Worker

    register_op()
    load_model = Worker.load_model

    @wraps(load_model)
    def guarded_load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        # Outside of load_model's memory pool: sleep mode must not discard the probes.
        _attach(self.model_runner)
        return result

    Worker.load_model = guarded_load_model


def _attach(runner: Any) -> None:
    """Loads the configured breaker into a model runner whose model is loaded.

    Raises:
        BreakerMismatchError: the model is not the one that the breaker was made for.
        UnsupportedEngineError: the engine runs in a mode that was not tested.
    """
    config = EngineGuardConfig.from_vllm_config(runner.vllm_config)
    if config is None or hasattr(runner, _PROBES_ATTRIBUTE):
        return
    check_engine_config(runner.vllm_config)
    breaker = config.load_breaker()
    hf_config = runner.vllm_config.model_config.hf_text_config
    base = breaker.manifest.base_model
    got = (hf_config.num_hidden_layers, hf_config.hidden_size)
    if got != (base.num_layers, base.hidden_size):
        raise BreakerMismatchError(
            f"breaker {breaker.manifest.name!r} is for {base.num_layers} layers of width "
            f"{base.hidden_size}, the engine loaded {got[0]} layers of width {got[1]}; "
            f"serve {base.id} or train a breaker for this model"
        )
    if config.adapter == "merged":
        check_merged_checkpoint(Path(runner.vllm_config.model_config.model), breaker)
    elif runner.vllm_config.lora_config is None:
        raise BreakerMismatchError("adapter 'dynamic' needs an engine with LoRA; got none")
    probes = WorkerProbes(breaker, runner.get_model(), _max_rows(runner.vllm_config), runner.device)
    setattr(runner, _PROBES_ATTRIBUTE, probes)
    _wrap_steps(runner, probes)
    logger.info("breaker %s: %d probes live", breaker.digest[:12], len(breaker.manifest.probes))


def _max_rows(vllm_config: Any) -> int:
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(vllm_config.scheduler_config.max_num_batched_tokens), int(captured))


def _wrap_steps(runner: Any, probes: WorkerProbes) -> None:
    from vllm.sequence import IntermediateTensors
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

    class ScoredAsyncOutput(AsyncModelRunnerOutput):
        """An async output whose rows arrive with its tokens."""

        def __init__(self, inner: Any, rows: PendingRows) -> None:
            self._inner = inner
            self._rows = rows

        def get_output(self) -> Any:
            output = self._inner.get_output()
            setattr(output, SCORES_ATTRIBUTE, self._rows.get())
            return output

    @wraps(execute_model)
    def guarded_execute_model(
        scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        earlier_NC = None
        if intermediate_tensors is not None:
            # Out of vLLM's sight: it looks for a buffer of its own for whatever it finds there.
            # Without it (a dummy run) the columns of earlier stages stay blank.
            earlier_NC = intermediate_tensors.tensors.pop(_RELAY_KEY, None)
        probes.begin_step(scheduler_output.total_num_scheduled_tokens, earlier_NC)
        output = execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        if isinstance(output, IntermediateTensors) and probes.enabled:
            output.tensors[_RELAY_KEY] = probes.hand_on()
        return output

    @wraps(sample_tokens)
    def guarded_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        ran = runner.execute_model_state is not None
        output = sample_tokens(*args, **kwargs)
        if not ran or not probes.enabled:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return ScoredAsyncOutput(output, probes.take_rows())
        # An empty output is a constant that steps share.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            setattr(output, SCORES_ATTRIBUTE, probes.take_rows().get())
        return output

    runner.execute_model = guarded_execute_model
    runner.sample_tokens = guarded_sample_tokens
