"""Worker side: the probe op inside the forward pass, and its rows on the step's output.

Shapes: N rows of the flattened batch, D model width, K probes of one layer, P probes in all.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.compat import check_engine_config, decoder_layers
from circuit_breakers.engine.config import EngineGuardConfig, check_merged_checkpoint
from circuit_breakers.errors import BreakerMismatchError

__all__ = ["SCORES_ATTRIBUTE", "BreakerWorkerExtension", "WorkerProbes", "install"]

logger = logging.getLogger("vllm.circuit_breakers")

SCORES_ATTRIBUTE = "circuit_breaker_logit_NP"
"""Attribute of a ModelRunnerOutput: float32 (N, P), rows in the order of the flattened batch."""

_GUARD_ATTRIBUTE = "_circuit_breakers"
_OP_NAME = "circuit_breakers_probe"


def _probe(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NP: torch.Tensor,
    column: int,
) -> None:
    """Writes the logits of K probes into columns [column, column + K) of the first N rows."""
    stream_ND = hidden_ND if residual_ND is None else hidden_ND + residual_ND
    logit_NK = torch.addmm(bias_K, stream_ND.float(), weight_DK)
    out_NP[: hidden_ND.shape[0], column : column + weight_DK.shape[1]].copy_(logit_NK)


def _probe_fake(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NP: torch.Tensor,
    column: int,
) -> None:
    return None


class WorkerProbes:
    """The probes of one worker: hooks on the probed blocks and one static score buffer."""

    def __init__(self, breaker: Breaker, model: Any, max_num_tokens: int, device: Any) -> None:
        self.digest = breaker.digest
        self._num_rows = 0
        specs = breaker.manifest.probes
        self._logit_NP = torch.full(
            (max_num_tokens, len(specs)), float("nan"), dtype=torch.float32, device=device
        )
        self._handles: list[Any] = []
        self._hooks: list[tuple[Any, Any]] = []
        by_layer: dict[int, list[int]] = defaultdict(list)
        for p, spec in enumerate(specs):
            by_layer[spec.layer].append(p)
        # Buffer columns are grouped by layer, so that a layer's probes are one matmul.
        columns = [p for layer in sorted(by_layer) for p in by_layer[layer]]
        self._order_P = np.argsort(np.array(columns))
        blocks = decoder_layers(model)
        for layer in sorted(by_layer):
            weights = [breaker.weights[specs[p].name] for p in by_layer[layer]]
            weight_DK = torch.from_numpy(np.stack([w.weight_D for w in weights], axis=1))
            bias_K = torch.tensor([w.bias for w in weights], dtype=torch.float32)
            self._hook(
                blocks[layer],
                weight_DK.float().to(device).contiguous(),
                bias_K.to(device),
                columns.index(by_layer[layer][0]),
            )
        self.enabled = False
        self.enable(True)

    def _hook(self, block: Any, weight_DK: torch.Tensor, bias_K: torch.Tensor, column: int) -> None:
        op = getattr(torch.ops.vllm, _OP_NAME)
        out_NP = self._logit_NP

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            # Fused blocks return (hidden, residual), whose sum is the stream; others the stream.
            hidden, residual = output if isinstance(output, tuple) else (output, None)
            op(hidden, residual, weight_DK, bias_K, out_NP, column)

        self._hooks.append((block, hook))

    def enable(self, on: bool) -> None:
        """Adds or removes the hooks. Off is for benchmarks only: every token is then unscored."""
        if on and not self.enabled:
            self._handles = [block.register_forward_hook(hook) for block, hook in self._hooks]
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        self.enabled = on

    def begin_step(self, num_rows: int) -> None:
        """Blanks the rows of the coming step: one that is not written reads as unscored."""
        self._num_rows = num_rows
        self._logit_NP[:num_rows].fill_(float("nan"))

    def take_rows(self) -> npt.NDArray[np.float32]:
        """Logits of the step's N rows, float32 (N, P), probes in manifest order; a copy."""
        rows: npt.NDArray[np.float32] = self._logit_NP[: self._num_rows].cpu().numpy()
        return rows[:, self._order_P]


class BreakerWorkerExtension:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

    def circuit_breaker_digest(self) -> str | None:
        """Digest of the breaker whose probes are live in this worker; None when there is none."""
        probes: WorkerProbes | None = getattr(self.model_runner, _GUARD_ATTRIBUTE, None)  # type: ignore[attr-defined]
        return None if probes is None or not probes.enabled else probes.digest

    def circuit_breaker_enable(self, on: bool) -> None:
        """Switches the probes, for benchmarks; the scheduler side fails closed on its own."""
        getattr(self.model_runner, _GUARD_ATTRIBUTE).enable(on)  # type: ignore[attr-defined]


def _attach(runner: Any) -> None:
    """Loads the configured breaker into a model runner whose model is loaded."""
    config = EngineGuardConfig.from_vllm_config(runner.vllm_config)
    if config is None or hasattr(runner, _GUARD_ATTRIBUTE):
        return
    check_engine_config(runner.vllm_config)
    breaker = config.load_breaker()
    hf_config = runner.model_config.hf_text_config
    base = breaker.manifest.base_model
    got = (hf_config.num_hidden_layers, hf_config.hidden_size)
    if got != (base.num_layers, base.hidden_size):
        raise BreakerMismatchError(
            f"breaker {breaker.manifest.name!r} is for {base.num_layers} layers of width "
            f"{base.hidden_size}, the engine loaded {got[0]} layers of width {got[1]}; "
            f"serve {base.id} or train a breaker for this model"
        )
    if config.adapter == "merged":
        check_merged_checkpoint(Path(runner.model_config.model), breaker)
    elif runner.lora_config is None:
        raise BreakerMismatchError("adapter 'dynamic' needs an engine with LoRA; got none")
    probes = WorkerProbes(
        breaker,
        runner.get_model(),
        runner.vllm_config.scheduler_config.max_num_batched_tokens,
        runner.device,
    )
    setattr(runner, _GUARD_ATTRIBUTE, probes)
    logger.info("breaker %s: %d probes live", breaker.digest[:12], len(breaker.manifest.probes))


def install() -> None:
    """Wraps the model runners' load and step methods. Without a breaker they do nothing more."""
    from vllm.utils.torch_utils import direct_register_custom_op
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    direct_register_custom_op(_OP_NAME, _probe, mutates_args=["out_NP"], fake_impl=_probe_fake)
    # CPUModelRunner overrides load_model and inherits the rest.
    for runner_class in (GPUModelRunner, CPUModelRunner):
        _wrap_load_model(runner_class)
    _wrap_steps(GPUModelRunner)


def _wrap_load_model(runner_class: Any) -> None:
    load_model = runner_class.load_model

    @wraps(load_model)
    def guarded_load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        _attach(self)
        return result

    runner_class.load_model = guarded_load_model


def _wrap_steps(runner_class: Any) -> None:
    execute_model, sample_tokens = runner_class.execute_model, runner_class.sample_tokens

    @wraps(execute_model)
    def guarded_execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        probes: WorkerProbes | None = getattr(self, _GUARD_ATTRIBUTE, None)
        if probes is not None:
            probes.begin_step(scheduler_output.total_num_scheduled_tokens)
        return execute_model(self, scheduler_output, *args, **kwargs)

    @wraps(sample_tokens)
    def guarded_sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran = self.execute_model_state is not None
        output = sample_tokens(self, *args, **kwargs)
        probes: WorkerProbes | None = getattr(self, _GUARD_ATTRIBUTE, None)
        if probes is not None and ran and probes.enabled:
            setattr(output, SCORES_ATTRIBUTE, probes.take_rows())
        return output

    runner_class.execute_model = guarded_execute_model
    runner_class.sample_tokens = guarded_sample_tokens
