"""Logits of one stream, kept as raw bytes: appending a step's row costs next to nothing, and an
array is made where somebody looks.

Shapes: T tokens of one stream, P probes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["ScoreRows", "nan_rows"]

FloatArray = npt.NDArray[np.float32]

_FLOAT_BYTES = np.dtype(np.float32).itemsize


def nan_rows(num_rows: int, num_probes: int) -> bytes:
    """Rows of tokens without a score."""
    return np.full((num_rows, num_probes), np.nan, np.float32).tobytes()


class ScoreRows:
    """float32 rows of P logits, by position."""

    __slots__ = ("_raw", "num_probes", "row_bytes")

    def __init__(self, num_probes: int) -> None:
        self.num_probes = num_probes
        self.row_bytes = num_probes * _FLOAT_BYTES
        self._raw = bytearray()

    def __len__(self) -> int:
        return len(self._raw) // self.row_bytes

    def write(self, start: int, raw: bytes) -> None:
        """Puts whole rows at position `start` and after it, over what is there; leaves no gap."""
        begin = start * self.row_bytes
        assert begin <= len(self._raw)
        self._raw[begin : begin + len(raw)] = raw

    def raw(self, start: int, end: int) -> bytes:
        """Rows [start, end) as bytes."""
        return bytes(self._raw[start * self.row_bytes : end * self.row_bytes])

    def array(self, start: int, end: int) -> FloatArray:
        """Rows [start, end) as a copy, float32 (T, P)."""
        return np.frombuffer(self.raw(start, end), np.float32).reshape(-1, self.num_probes)
