"""The residual stream of whole conversations, streamed: read, score or sample, and forget.

It is read where serving reads it: from the merged checkpoint, in its own dtype, at the output of
decoder blocks. Nothing above the deepest of these blocks is run, and the lm_head is never loaded.

B conversations, T tokens, L layers, D model width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel

from circuit_breakers.hardware import pick_device, quick_dtype
from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.blocks import cut_blocks, decoder_blocks, record_outputs
from circuit_breakers_training.render import Rendered

__all__ = ["ResidualReader", "ResidualRows"]

FloatArray = npt.NDArray[np.float32]

_TOKENS_PER_BATCH = 2048
"""Large enough for matrix products to be efficient; the working set stays below 100 MB."""


class ResidualRows(NamedTuple):
    """One conversation, every token of it and no padding."""

    row: int
    """Place of the conversation in the sequence that was given."""
    hidden_TLD: FloatArray
    """HF hidden_states[layer + 1] of each layer, in the order of the reader's layers."""


class ResidualReader:
    """A checkpoint that is run only as far up as the probes look."""

    def __init__(self, model_dir: Path, layers: Sequence[int]) -> None:
        """Loads the blocks up to the deepest of `layers` in the checkpoint's dtype."""
        assert layers
        self.layers = tuple(layers)
        self._device = pick_device()
        self._model: Any = AutoModel.from_pretrained(
            model_dir,
            dtype=quick_dtype(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        # The last block's entry in HF's hidden states comes after the final norm.
        assert max(layers) <= len(decoder_blocks(self._model)) - 2
        cut_blocks(self._model, max(layers) + 1)
        self._model.eval().to(self._device)
        blocks = decoder_blocks(self._model)
        self._probed = [blocks[layer] for layer in self.layers]

    def read(
        self, rows: Sequence[Rendered], *, progress: Callable[[int], None] = lambda _: None
    ) -> Iterator[ResidualRows]:
        """The residual stream of each conversation, batched by length, so not in the given order.

        Args:
            progress: called with the number of conversations that were just finished.
        """
        for batch in _batches_by_length([len(row.ids) for row in rows]):
            padded = pad_rows([rows[i] for i in batch], ["all"] * len(batch))
            hidden_LBTD = self._forward(padded.ids_BT, padded.mask_BT)
            for b, index in enumerate(batch):
                num_tokens = len(rows[index].ids)
                yield ResidualRows(
                    index, np.stack([h[b, :num_tokens] for h in hidden_LBTD], axis=1)
                )
            progress(len(batch))

    @torch.inference_mode()
    def _forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[FloatArray]:
        with record_outputs(self._probed) as outputs:
            self._model(
                input_ids=ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device, torch.int64),
                use_cache=False,
            )
            return [hidden_BTD.float().cpu().numpy() for hidden_BTD in outputs]


def _batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups of similar length, longest first: running out of memory shows at once."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = max(longest, lengths[index])
        if batch and (len(batch) + 1) * longest > _TOKENS_PER_BATCH:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch
