"""The probes of one worker: an op inside the forward pass and the buffer that it writes.

Shapes: N rows of the flattened batch, D model width, K probes of one layer, P probes in all.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.compat import decoder_layers

__all__ = ["PendingRows", "WorkerProbes", "register_op"]

FloatArray = npt.NDArray[np.float32]

_OP_NAME = "circuit_breakers_probe"

_disabled = False
"""Set for the plain arm of benchmarks: in a compiled graph the op is there to stay."""


def _probe(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NP: torch.Tensor,
    column: int,
) -> None:
    """Writes the logits of K probes into columns [column, column + K) of the first N rows."""
    if _disabled:
        return
    stream_ND = hidden_ND if residual_ND is None else hidden_ND + residual_ND
    out_NK = out_NP[: hidden_ND.shape[0], column : column + weight_DK.shape[1]]
    torch.addmm(bias_K, stream_ND.float(), weight_DK, out=out_NK)


def _probe_fake(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NP: torch.Tensor,
    column: int,
) -> None:
    return None


def register_op() -> None:
    """Makes the op known to torch; once a process."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(_OP_NAME, _probe, mutates_args=["out_NP"], fake_impl=_probe_fake)


class PendingRows:
    """Rows on their way from the device; `get` waits for them."""

    def __init__(self, logit_NP: torch.Tensor | FloatArray, order_P: npt.NDArray[np.intp]) -> None:
        """Copies the rows before the next step blanks the buffer."""
        self._order_P = order_P
        self._ready: Any = None
        if isinstance(logit_NP, np.ndarray):
            self._host_NP = logit_NP.copy()
            return
        self._device_NP = logit_NP.clone()
        host_NP = torch.empty_like(self._device_NP, device="cpu", pin_memory=True)
        host_NP.copy_(self._device_NP, non_blocking=True)
        self._ready = torch.Event(logit_NP.device)
        self._ready.record()
        self._host_NP = host_NP.numpy()

    def get(self) -> FloatArray:
        """Logits of the step's N rows, float32 (N, P), probes in manifest order."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host_NP[:, self._order_P] if len(self._order_P) > 1 else self._host_NP


class WorkerProbes:
    """Hooks on the probed blocks of one worker, and one static score buffer.

    With pipeline parallelism a worker has some of the blocks. It hands its columns to the next
    stage, so that the last one, whose output vLLM takes, has them all.
    """

    def __init__(self, breaker: Breaker, model: Any, num_rows: int, device: Any) -> None:
        """Puts the probes of `breaker` on the blocks of `model`.

        Args:
            num_rows: most rows of one forward pass, padding included.
        """
        self.digest = breaker.digest
        self._num_rows = 0
        specs = breaker.manifest.probes
        self._logit_NP = torch.full(
            (num_rows, len(specs)), float("nan"), dtype=torch.float32, device=device
        )
        on_host = self._logit_NP.device.type == "cpu"
        self._host_NP: FloatArray | None = self._logit_NP.numpy() if on_host else None
        """The buffer once more, where numpy can reach it: several times cheaper a step."""
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
            if _is_on_another_stage(blocks[layer]):
                continue
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
            # As an op, it is opaque to the compiler; a plain call is cheaper.
            probe = op if torch.compiler.is_compiling() else _probe
            probe(hidden, residual, weight_DK, bias_K, out_NP, column)

        self._hooks.append((block, hook))

    def enable(self, on: bool) -> None:
        """Adds or removes the hooks. Off is for benchmarks only: every token is then unscored.

        Eager engines only: compiled code looks for its hooks by position.
        """
        global _disabled
        _disabled = not on
        if on and not self.enabled:
            self._handles = [block.register_forward_hook(hook) for block, hook in self._hooks]
        elif not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        self.enabled = on

    def begin_step(self, num_rows: int, earlier_NP: torch.Tensor | None = None) -> None:
        """Blanks the rows of the coming step: one that is not written reads as unscored.

        Args:
            earlier_NP: what the stage before handed on, own columns blank.
        """
        self._num_rows = num_rows
        if earlier_NP is not None:
            self._logit_NP[:num_rows].copy_(earlier_NP[:num_rows])
        elif self._host_NP is not None:
            self._host_NP[:num_rows] = np.nan
        else:
            self._logit_NP[:num_rows].fill_(float("nan"))

    def hand_on(self) -> torch.Tensor:
        """The step's rows for the next pipeline stage, float32 (N, P), columns by layer."""
        return self._logit_NP[: self._num_rows].clone()

    def take_rows(self) -> PendingRows:
        """The step's rows, on their way to the host."""
        buffer_NP = self._logit_NP if self._host_NP is None else self._host_NP
        return PendingRows(buffer_NP[: self._num_rows], self._order_P)


def _is_on_another_stage(block: Any) -> bool:
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(block, PPMissingLayer)
