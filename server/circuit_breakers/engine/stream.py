"""One running request as the scheduler's guard sees it: its scores, its verdict, its held output.

Shapes: T tokens of one request, P probes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from circuit_breakers.engine.block_scores import BlockScores
from circuit_breakers.engine.score_rows import ScoreRows, nan_rows
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import Trip
from circuit_breakers.guard.policy import Policy

__all__ = ["RequestStream"]


class RequestStream:
    """Positions are those of prompt + completion; each is judged once, in order."""

    __slots__ = (
        "_breaker",
        "_judged_from",
        "_judged_to",
        "_num_published",
        "_rows",
        "_watch_to",
        "held",
        "held_end",
        "num_judged",
        "num_rows",
        "num_sent",
        "policy",
        "request",
    )

    def __init__(self, policy: Policy, request: Any) -> None:
        self.request = request
        self.policy = policy
        """What this request is judged by, from its start to its end."""
        num_prompt_tokens = request.num_prompt_tokens
        self._breaker = StreamBreaker(policy, num_prompt_tokens)
        # Outside of these positions no score trips, only the lack of one.
        self._judged_from = policy.num_skipped(num_prompt_tokens)
        self._judged_to = sys.maxsize if "completion" in policy.phases else num_prompt_tokens
        self._rows = ScoreRows(len(policy.probes))
        self._num_published = 0
        """Leading full blocks already in the block store."""
        self._watch_to = 0
        """Positions before this one may trip, as far as the screen can tell; later ones cannot."""
        self.num_rows = 0
        """Positions fed so far; moves back when a preempted request starts over."""
        self.num_judged = 0
        """Positions that have their verdict; their logits are final."""
        self.num_sent = 0
        """Scores delivered so far."""
        self.held: Any = None
        """EngineCoreOutput whose last token has no score yet."""
        self.held_end = 0
        """Positions that must be judged before `held` may leave."""

    @property
    def num_probes(self) -> int:
        return self._rows.num_probes

    def restart(self, start: int, block_scores: BlockScores) -> None:
        """The request runs from position `start`: new, after a cache hit, or after a preemption.

        Takes the logits of the positions before out of the store, where `gate_prefix_cache` saw
        them; unknown ones stay NaN, and trip.
        """
        rows = self._rows
        if self.num_judged < start:
            rows.write(self.num_judged, nan_rows(start - self.num_judged, rows.num_probes))
        size = block_scores.block_size
        hashes = self.request.block_hashes
        for begin in range(self.num_judged // size * size, start, size):
            block = block_scores.get(hashes[begin // size])
            if block is not None:
                # Judged positions keep theirs.
                first, end = max(begin, self.num_judged), min(begin + size, start)
                part = slice((first - begin) * rows.row_bytes, (end - begin) * rows.row_bytes)
                rows.write(first, block[part])
        self._num_published = start // size
        self.num_rows = start
        if self.num_judged < start and self._may_trip(self.num_judged, start):
            self._watch(start)

    def write(self, raw: bytes, may_trip: bool) -> None:
        """Takes in the raw logits of the next positions. Judged positions keep theirs."""
        rows = self._rows
        start = self.num_rows
        end = start + len(raw) // rows.row_bytes
        first = max(start, self.num_judged)
        if first < end:
            rows.write(first, raw[(first - start) * rows.row_bytes :] if first > start else raw)
            if may_trip and self._may_trip(first, end):
                self._watch(end)
        self.num_rows = end

    def trim(self, num_tokens: int) -> None:
        """Drops rows of drafts behind a stop; they belong to no token of the request."""
        self.num_rows = min(self.num_rows, num_tokens)

    def publish(self, block_scores: BlockScores) -> None:
        """Puts blocks that are full by now into the store."""
        size = block_scores.block_size
        while (end := (self._num_published + 1) * size) <= self.num_rows:
            hashes = self.request.block_hashes
            if self._num_published >= len(hashes):
                break
            if np.isfinite(self._rows.array(end - size, end)).all():
                block_scores.put(hashes[self._num_published], self._rows.raw(end - size, end))
            self._num_published += 1

    def judge(self) -> Trip | None:
        """Verdict on the positions that no earlier step has judged; the trip if there is one."""
        if self.num_rows <= self.num_judged:
            # A preempted request catches up with what is judged.
            return None
        first, self.num_judged = self.num_judged, self.num_rows
        if first >= self._watch_to:
            return None
        return self._breaker.update(self._rows.array(self._breaker.num_seen, self.num_judged))

    def unsent(self, end: int) -> bytes:
        """Raw logits of the positions from `num_sent` up to `end`."""
        return self._rows.raw(self.num_sent, end)

    def _watch(self, end: int) -> None:
        """A position before `end` may trip, or make one behind it trip."""
        self._watch_to = max(self._watch_to, end + self.policy.longest_window - 1)

    def _may_trip(self, start: int, end: int) -> bool:
        logit_TP = self._rows.array(start, end)
        begin = min(max(0, self._judged_from - start), end - start)
        stop = max(min(self._judged_to - start, end - start), begin)
        if not self.policy.screen.is_harmless(logit_TP[begin:stop]):
            return True
        return not (np.isfinite(logit_TP[:begin]).all() and np.isfinite(logit_TP[stop:]).all())
