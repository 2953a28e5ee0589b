"""The checks before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from circuit_breakers.api.preflight import (
    MemoryNeed,
    available_memory_bytes,
    bind,
    check_memory,
    memory_need,
)
from circuit_breakers.errors import ConfigError
from circuit_breakers.hardware import quick_dtype

GIB = 1 << 30


def test_a_bound_port_listens_and_is_nobody_elses() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_an_address_of_another_machine_is_refused_with_the_cure(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind(host, 0)


def test_too_little_memory_names_the_parts_and_the_flags() -> None:
    need = MemoryNeed(weights=3 * GIB, kv_cache=2 * GIB, runtime=2 * GIB)
    check_memory(need, 7 * GIB)
    with pytest.raises(ConfigError, match=r"6\.0 GiB available, about 7\.0 GiB.*--kv-cache-gib"):
        check_memory(need, 6 * GIB)


def test_memory_need_follows_the_weights_on_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(500))
    stored = memory_need(tmp_path, kv_cache_gib=3, dtype="bfloat16")
    widened = memory_need(tmp_path, kv_cache_gib=3, dtype="float32")
    assert stored.kv_cache == 3 * GIB
    assert (stored.weights, widened.weights) == (2000, 4000)
    # What a CPU without AVX-512 loads as, unless told otherwise.
    own = {"auto": stored, "float32": widened}[quick_dtype()]
    assert memory_need(tmp_path, kv_cache_gib=3, dtype="auto") == own


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    machine = available_memory_bytes(tmp_path)  # no cgroup here
    assert machine > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_memory_bytes(tmp_path) == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_memory_bytes(tmp_path) == 1000000 - 5
