"""Clients of this repository's Python package on the shared server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from circuit_breakers_client import CircuitBreakers

from ..conftest import Guarded


@pytest.fixture
def client(guarded: Guarded) -> Iterator[CircuitBreakers]:
    with CircuitBreakers(base_url=guarded.url, api_key=guarded.key, max_retries=0) as client:
        yield client


@pytest.fixture
def raising(client: CircuitBreakers) -> CircuitBreakers:
    return client.with_options(on_trip="raise")


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """Arguments of one chat with a known answer."""
    messages = [{"role": "user", "content": text}]
    return {
        "model": Guarded("").model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": 32,
    } | fields
