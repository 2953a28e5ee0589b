"""The requests that have run and not ended, and one screen for whatever they are judged by."""

from __future__ import annotations

from collections import Counter
from typing import Any

from circuit_breakers.engine.request_policy import RequestPolicies
from circuit_breakers.engine.stream import RequestStream
from circuit_breakers.guard.policy import Policy
from circuit_breakers.guard.screen import Screen

__all__ = ["RunningStreams"]


class RunningStreams:
    """Streams by request id."""

    def __init__(self) -> None:
        self._streams: dict[str, RequestStream] = {}
        self._policies = RequestPolicies()
        self._num_by_screen: Counter[Screen] = Counter()
        self.screen: Screen | None = None
        """Passes only what no stream's policy could trip on; None without a stream."""

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def __getitem__(self, request_id: str) -> RequestStream:
        return self._streams[request_id]

    def get(self, request_id: str) -> RequestStream | None:
        return self._streams.get(request_id)

    def open(self, request: Any, default: Policy) -> RequestStream:
        """The stream of a request that runs for the first time.

        Args:
            default: what it is judged by when it brings no policy of its own.
        """
        policy = self._policies.of(request, default)
        stream = self._streams[request.request_id] = RequestStream(policy, request)
        self._num_by_screen[policy.screen] += 1
        if self._num_by_screen[policy.screen] == 1:
            self.screen = Screen.strictest(list(self._num_by_screen))
        return stream

    def close(self, request_id: str) -> None:
        screen = self._streams.pop(request_id).policy.screen
        self._num_by_screen[screen] -= 1
        if self._num_by_screen[screen] == 0:
            del self._num_by_screen[screen]
            left = list(self._num_by_screen)
            self.screen = Screen.strictest(left) if left else None
