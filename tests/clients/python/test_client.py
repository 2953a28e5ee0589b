"""Options of the clients, what they rest on in openai, and requests that tighten their policy."""

from __future__ import annotations

import ast
import socket
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

import circuit_breakers_client
from circuit_breakers_client import (
    POLICY_HEADER,
    AsyncCircuitBreakers,
    CircuitBreakers,
    guard_of,
    tighten,
)

from ...server.api.capitals import ITALY
from .conftest import chat

CLIENTS: list[Any] = [CircuitBreakers, AsyncCircuitBreakers]


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_copy_keeps_the_rules(kind: Any) -> None:
    client = kind(base_url="http://localhost/v1", api_key="x", on_trip="raise", require_guard=False)
    for copied in (client.copy(), client.with_options(timeout=5)):
        assert type(copied) is kind
        assert copied._rules == client._rules
    assert client.with_options(timeout=5).timeout == 5
    assert client.with_options(on_trip="return")._rules == ("return", False)
    assert client._rules == ("raise", False)


@pytest.mark.parametrize("kind", CLIENTS)
def test_arguments_that_cannot_be_meant_are_refused(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="expected 'return' or 'raise'"):
        kind(base_url="http://localhost/v1", api_key="x", on_trip="rais")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="got no base URL"):
        kind(api_key="x")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost/v1")
    assert str(kind(api_key="x").base_url) == "http://localhost/v1/"


def test_nothing_of_openai_s_clients_is_hidden() -> None:
    for ours, theirs in (
        (CircuitBreakers, openai.OpenAI),
        (AsyncCircuitBreakers, openai.AsyncOpenAI),
    ):
        assert not hasattr(theirs, "breaker"), "openai has a `breaker` of its own now"
        assert not hasattr(theirs, "_rules") and not hasattr(theirs, "_has_breaker")
        assert issubclass(ours, theirs)


def test_it_needs_openai_and_nothing_else() -> None:
    (package,) = circuit_breakers_client.__path__
    imported = set()
    for module in Path(package).glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"circuit_breakers_client", "openai"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"policy": "strict", "mode": "enforce"}, {"policy": "strict", "mode": "enforce"}),
        ({"target_fpr": 0.01}, {"target_fpr": 0.01}),
        ({"threshold": 0}, {"threshold": 0}),
        ({"threshold": {"paris": -1.5}}, {"threshold": {"paris": -1.5}}),
    ],
)
def test_tighten_says_what_is_asked(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    assert tighten(**asked) == {"extra_body": {"guard": expected}}


@pytest.mark.parametrize("asked", [{}, {"target_fpr": 0.1, "threshold": 1.0}])
def test_tighten_refuses_what_the_server_would(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        tighten(**asked)


def test_a_request_is_tightened(client: CircuitBreakers) -> None:
    # The threshold of the other promise that the breaker makes, LOOSE_THRESHOLD.
    for asked, threshold in (
        (tighten(target_fpr=0.05, mode="enforce"), -0.25),
        (tighten(threshold={"paris": -0.5, "zebra": -0.5}), -0.5),
    ):
        report = guard_of(client.chat.completions.create(**chat(ITALY), **asked))
        assert report is not None and report.threshold == threshold
    strict = client.with_options(default_headers={POLICY_HEADER: "nothing"})
    with pytest.raises(openai.BadRequestError) as caught:
        strict.chat.completions.create(**chat(ITALY))
    report = guard_of(caught.value)
    assert report is not None and report.policy == "nothing"


def test_connection_errors_and_timeouts_are_openai_s() -> None:
    # Connections are accepted by the kernel, and nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        client = CircuitBreakers(base_url=url, api_key="x", timeout=0.2, max_retries=1)
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**chat(ITALY))
        silent.settimeout(5)
        # As often as it was tried.
        for _ in range(2):
            silent.accept()[0].close()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    client.close()
