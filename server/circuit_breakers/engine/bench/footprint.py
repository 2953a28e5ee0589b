"""Memory of the guard's block score store, counted object by object, next to the KV cache's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from circuit_breakers.engine.block_scores import BlockScores
from circuit_breakers.engine.score_rows import nan_rows

__all__ = ["Footprint", "footprint", "store_bytes"]

_HASH_BYTES = 32
"""Length of vLLM's block hashes (sha256)."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of one engine."""

    num_probes: int
    block_tokens: int
    """Tokens of one scored block."""
    capacity_blocks: int
    live_blocks: int
    """Blocks that the benchmark's own requests left in the store."""
    live_bytes: int
    full_bytes: int
    """The store at its capacity, filled with blocks that are not real."""
    kv_cache_bytes: int

    @property
    def full_share(self) -> float:
        """Of the KV cache's bytes."""
        return self.full_bytes / self.kv_cache_bytes


def store_bytes(store: BlockScores) -> int:
    """Bytes of a store and of all that it alone holds, by sys.getsizeof."""
    num_bytes = sys.getsizeof(store) + sys.getsizeof(vars(store)) + sys.getsizeof(store._rows)
    for block_hash, rows in store._rows.items():
        num_bytes += sys.getsizeof(block_hash) + sys.getsizeof(rows)
    return num_bytes


def footprint(scheduler: Any, guard: Any, num_probes: int) -> Footprint:
    """Counts the live store and one filled to its capacity with `num_probes` scores a token."""
    live: BlockScores = guard.block_scores
    full = BlockScores(live.block_size, live._capacity)
    for i in range(live._capacity):
        # One object a block, as live ones are.
        full.put(i.to_bytes(_HASH_BYTES, "big"), nan_rows(live.block_size, num_probes))
    return Footprint(
        num_probes=num_probes,
        block_tokens=live.block_size,
        capacity_blocks=live._capacity,
        live_blocks=len(live),
        live_bytes=store_bytes(live),
        full_bytes=store_bytes(full),
        kv_cache_bytes=sum(t.size for t in scheduler.kv_cache_config.kv_cache_tensors),
    )
