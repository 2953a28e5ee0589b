"""The probes of one worker: an op inside the forward pass and the buffer that it writes.

A probe of several layers has a column of the buffer for each; they are added up on the host, where
a column that was not written makes the sum NaN, which is unscored.

Shapes: N rows of the flattened batch, D model width, K columns of one layer, C columns in all,
P probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from circuit_breakers.artifact import Breaker, ProbeSpec
from circuit_breakers.engine.compat import decoder_layers

__all__ = ["PendingRows", "ProbeColumns", "WorkerProbes", "register_op"]

FloatArray = npt.NDArray[np.float32]

_OP_NAME = "circuit_breakers_probe"

_disabled = False
"""Set for the plain arm of benchmarks: in a compiled graph the op is there to stay."""


def _probe(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NC: torch.Tensor,
    column: int,
) -> None:
    """Writes what one layer adds to K probes into columns [column, column + K) of N rows."""
    if _disabled:
        return
    stream_ND = hidden_ND if residual_ND is None else hidden_ND + residual_ND
    out_NK = out_NC[: hidden_ND.shape[0], column : column + weight_DK.shape[1]]
    torch.addmm(bias_K, stream_ND.float(), weight_DK, out=out_NK)


def _probe_fake(
    hidden_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight_DK: torch.Tensor,
    bias_K: torch.Tensor,
    out_NC: torch.Tensor,
    column: int,
) -> None:
    return None


def register_op() -> None:
    """Makes the op known to torch; once a process."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(_OP_NAME, _probe, mutates_args=["out_NC"], fake_impl=_probe_fake)


class ProbeColumns:
    """Which columns of the buffer make up which probe: one for each layer that it reads.

    They are grouped by layer, so that a layer's columns are one matmul.
    """

    def __init__(self, specs: Sequence[ProbeSpec]) -> None:
        layers = sorted({layer for spec in specs for layer in spec.read_layers})
        self.by_layer = {
            layer: [p for p, spec in enumerate(specs) if layer in spec.read_layers]
            for layer in layers
        }
        """Probes of each layer, in the order of their columns; layers ascending."""
        pairs = [(layer, p) for layer, probes in self.by_layer.items() for p in probes]
        column_of = {pair: column for column, pair in enumerate(pairs)}
        self.num_columns = len(pairs)
        self._first_P = np.array([column_of[s.read_layers[0], p] for p, s in enumerate(specs)])
        self._further = [
            (p, column_of[layer, p]) for p, s in enumerate(specs) for layer in s.read_layers[1:]
        ]

    def first_column(self, layer: int) -> int:
        """Where the columns of `layer` begin."""
        return sum(len(probes) for other, probes in self.by_layer.items() if other < layer)

    def to_logits(self, part_NC: FloatArray) -> FloatArray:
        """Logits (N, P), probes in manifest order; layers are added from the lowest up."""
        if self.num_columns == 1:
            return part_NC
        logit_NP = part_NC[:, self._first_P]
        if self._further:
            # Infinities that cancel give NaN, which is unscored; there is nothing to warn of.
            with np.errstate(invalid="ignore", over="ignore"):
                for p, column in self._further:
                    logit_NP[:, p] += part_NC[:, column]
        return logit_NP


class PendingRows:
    """Rows on their way from the device; `get` waits for them."""

    def __init__(self, part_NC: torch.Tensor | FloatArray, columns: ProbeColumns) -> None:
        """Copies the rows before the next step blanks the buffer."""
        self._columns = columns
        self._ready: Any = None
        if isinstance(part_NC, np.ndarray):
            self._host_NC = part_NC.copy()
            return
        self._device_NC = part_NC.clone()
        host_NC = torch.empty_like(self._device_NC, device="cpu", pin_memory=True)
        host_NC.copy_(self._device_NC, non_blocking=True)
        self._ready = torch.Event(part_NC.device)
        self._ready.record()
        self._host_NC = host_NC.numpy()

    def get(self) -> FloatArray:
        """Logits of the step's N rows, float32 (N, P), probes in manifest order."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._columns.to_logits(self._host_NC)


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
        self._columns = ProbeColumns(specs)
        self._part_NC = torch.full(
            (num_rows, self._columns.num_columns),
            float("nan"),
            dtype=torch.float32,
            device=device,
        )
        on_host = self._part_NC.device.type == "cpu"
        self._host_NC: FloatArray | None = self._part_NC.numpy() if on_host else None
        """The buffer once more, where numpy can reach it: several times cheaper a step."""
        self._handles: list[Any] = []
        self._hooks: list[tuple[Any, Any]] = []
        blocks = decoder_layers(model)
        for layer, probes in self._columns.by_layer.items():
            if _is_on_another_stage(blocks[layer]):
                continue
            at = [specs[p].read_layers.index(layer) for p in probes]
            weights = [breaker.weights[specs[p].name] for p in probes]
            weight_DK = torch.from_numpy(
                np.stack([w.weight_LD[i] for w, i in zip(weights, at, strict=True)], axis=1)
            )
            # The bias comes in once, with the lowest of a probe's layers.
            bias_K = torch.tensor(
                [0.0 if i else w.bias for w, i in zip(weights, at, strict=True)],
                dtype=torch.float32,
            )
            self._hook(
                blocks[layer],
                weight_DK.float().to(device).contiguous(),
                bias_K.to(device),
                self._columns.first_column(layer),
            )
        self.enabled = False
        self.enable(True)

    def _hook(self, block: Any, weight_DK: torch.Tensor, bias_K: torch.Tensor, column: int) -> None:
        op = getattr(torch.ops.vllm, _OP_NAME)
        out_NC = self._part_NC

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            # Fused blocks return (hidden, residual), whose sum is the stream; others the stream.
            hidden, residual = output if isinstance(output, tuple) else (output, None)
            # As an op, it is opaque to the compiler; a plain call is cheaper.
            probe = op if torch.compiler.is_compiling() else _probe
            probe(hidden, residual, weight_DK, bias_K, out_NC, column)

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

    def begin_step(self, num_rows: int, earlier_NC: torch.Tensor | None = None) -> None:
        """Blanks the rows of the coming step: one that is not written reads as unscored.

        Args:
            earlier_NC: what the stage before handed on, own columns blank.
        """
        self._num_rows = num_rows
        if earlier_NC is not None:
            self._part_NC[:num_rows].copy_(earlier_NC[:num_rows])
        elif self._host_NC is not None:
            self._host_NC[:num_rows] = np.nan
        else:
            self._part_NC[:num_rows].fill_(float("nan"))

    def hand_on(self) -> torch.Tensor:
        """The step's rows for the next pipeline stage, float32 (N, C), columns by layer."""
        return self._part_NC[: self._num_rows].clone()

    def take_rows(self) -> PendingRows:
        """The step's rows, on their way to the host."""
        buffer_NC = self._part_NC if self._host_NC is None else self._host_NC
        return PendingRows(buffer_NC[: self._num_rows], self._columns)


def _is_on_another_stage(block: Any) -> bool:
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(block, PPMissingLayer)
