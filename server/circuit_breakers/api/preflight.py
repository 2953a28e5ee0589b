"""What is checked before a model is loaded: the port is free, and the memory suffices."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import NamedTuple

import psutil

from circuit_breakers.errors import ConfigError
from circuit_breakers.hardware import load_dtype

__all__ = ["MemoryNeed", "available_memory_bytes", "bind", "check_memory", "memory_need"]

_GIB = 1 << 30
_RUNTIME_BYTES = 2 * _GIB
"""Interpreter, torch and vLLM in two processes, before any weight."""
_WEIGHT_COPIES = 2.0
"""The weights themselves, and the copy that is alive while they are converted and packed."""
_CGROUP = Path("/sys/fs/cgroup")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the address, so that nobody else gets the port meanwhile.

    Raises:
        ConfigError: the port is taken, or the address is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as e:
        raise ConfigError(
            f"got --host {host!r}, expected an address of this machine ({e.strerror}); "
            "pass 127.0.0.1 or 0.0.0.0"
        ) from e
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use; stop the server that has it, or pass another "
                "--port (0 takes a free one)"
            ) from e
        raise ConfigError(
            f"cannot listen on {host} port {port}: {e.strerror}; pass another --host or --port"
        ) from e
    return listener


class MemoryNeed(NamedTuple):
    """Bytes of main memory that a server takes on a CPU."""

    weights: int
    kv_cache: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(self)


def memory_need(model_dir: Path, *, kv_cache_gib: int, dtype: str) -> MemoryNeed:
    """An estimate from the size of the weights on disk."""
    on_disk = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    # A checkpoint is 16-bit but for rare cases; float32 doubles it.
    widening = 2 if load_dtype(dtype) == "float32" else 1
    return MemoryNeed(
        weights=int(on_disk * widening * _WEIGHT_COPIES),
        kv_cache=kv_cache_gib * _GIB,
        runtime=_RUNTIME_BYTES,
    )


def available_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Main memory that this process may still take, by the machine and by its container."""
    available: int = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # not cgroup v2, or no container
    return available if limit == "max" else min(available, int(limit) - used)


def check_memory(need: MemoryNeed, available: int) -> None:
    """Passes when the server will fit.

    Raises:
        ConfigError: with what is needed, what is there, and which flags lower it.
    """
    if need.total <= available:
        return
    raise ConfigError(
        f"too little memory: {available / _GIB:.1f} GiB available, about "
        f"{need.total / _GIB:.1f} GiB needed (weights {need.weights / _GIB:.1f}, KV cache "
        f"{need.kv_cache / _GIB:.1f}, runtime {need.runtime / _GIB:.1f}); lower --kv-cache-gib, "
        "pass --dtype bfloat16, or take a smaller model"
    )
