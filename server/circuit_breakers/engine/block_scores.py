"""Scores of prefix-cached tokens: what the KV cache remembers of a prompt, the guard must too."""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import wraps
from typing import Any

__all__ = ["BlockScores", "gate_prefix_cache"]

logger = logging.getLogger("vllm.circuit_breakers")


class BlockScores:
    """Logits of full KV blocks, as raw rows, under the same hashes as vLLM's prefix cache.

    A hash covers all tokens up to the block's end, so its logits are those of every request that
    hits it. Holds more blocks than the KV cache can; what is evicted all the same is recomputed
    (`knows` gates the prefix-cache hit).
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        self.block_size = block_size
        self._capacity = capacity
        self._rows: OrderedDict[Any, bytes] = OrderedDict()

    def put(self, block_hash: Any, rows: bytes) -> None:
        self._rows[block_hash] = rows
        self._rows.move_to_end(block_hash)
        while len(self._rows) > self._capacity:
            self._rows.popitem(last=False)

    def knows(self, block_hashes: Any, num_tokens: int) -> bool:
        """Whether every block of the first `num_tokens` tokens has its scores."""
        num_blocks = -(-num_tokens // self.block_size)
        if num_blocks > len(block_hashes):
            return False
        # get() marks them as used, so that no block published before they are read evicts them.
        return all(self.get(block_hashes[i]) is not None for i in range(num_blocks))

    def get(self, block_hash: Any) -> bytes | None:
        rows = self._rows.get(block_hash)
        if rows is not None:
            self._rows.move_to_end(block_hash)
        return rows

    def clear(self) -> None:
        self._rows.clear()

    def __len__(self) -> int:
        return len(self._rows)


def gate_prefix_cache(manager: Any, block_scores: BlockScores) -> None:
    """Lets a hit of vLLM's KV cache manager count only where the scores of its tokens are known."""
    get_computed_blocks = manager.get_computed_blocks

    @wraps(get_computed_blocks)
    def gated(request: Any) -> Any:
        hit = get_computed_blocks(request)
        if block_scores.knows(request.block_hashes, hit[1]):
            return hit
        logger.info("prefix-cache hit without scores: %d tokens are computed again", hit[1])
        return (manager.empty_kv_cache_blocks, *(0 for _ in hit[1:]))

    manager.get_computed_blocks = gated
