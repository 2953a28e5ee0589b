"""What a training step sees at its targets."""

from __future__ import annotations

from torch import Tensor

from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.batches import TokenBatch

__all__ = ["target_states"]


def target_states(streams: Streams, batch: TokenBatch) -> list[tuple[Tensor, Tensor]]:
    """(C, D) adapted and base states of the counted tokens, for each target, ascending."""
    seen: list[tuple[Tensor, Tensor]] = []
    streams.compare(
        batch,
        lambda _layer, adapted_CD, base_CD: seen.append((adapted_CD, base_CD)),
        layers=streams.targets,
    )
    return seen
