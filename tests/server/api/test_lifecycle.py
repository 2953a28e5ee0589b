"""Starts that fail do so with one message, starts that are interrupted leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry

from circuit_breakers.api import lifecycle
from circuit_breakers.api.lifecycle import load_parts
from circuit_breakers.errors import ArtifactError, BreakerMismatchError, ConfigError, ModelError
from circuit_breakers.models import ResolvedModel
from circuit_breakers.settings import ServeSettings

from .conftest import MODEL, Server, free_port, serve_command, server_environment
from .scripted import scripted_server
from .scripted_engine import EngineServing


def run_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        serve_command(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=server_environment(),
    )


def test_a_port_in_use_ends_the_start_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_to_its_end("--port", port, "--model", "never looked at")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {port} on 127.0.0.1 is in use")
    assert "Traceback" not in done.stderr


def test_an_unknown_model_ends_the_start_with_one_message() -> None:
    done = run_to_its_end("--port", "0", "--model", "no-such-model")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_parts_that_do_not_belong_together_are_refused(
    smollm2: ResolvedModel, word_breaker: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        load_parts(ServeSettings(model="no-such-model", breaker=word_breaker))
    with pytest.raises(ArtifactError):
        load_parts(ServeSettings(model=MODEL, breaker=tmp_path))
    # The same files under another name are another model to the breaker.
    other = tmp_path / "other-model"
    other.symlink_to(smollm2.path)
    with pytest.raises((BreakerMismatchError, ModelError)):
        load_parts(ServeSettings(model=str(other), breaker=word_breaker))
    with pytest.raises(ConfigError, match=r"no breaker ships for model .*--breaker DIR"):
        load_parts(ServeSettings(model=str(other)))


def test_a_start_that_is_interrupted_has_no_longer_than_a_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(*_: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.sleep(60)

    async def give_up(starting: asyncio.Task[None]) -> None:
        starting.cancel()  # without ending the processes of other tests

    monkeypatch.setattr(lifecycle, "REGISTRY", CollectorRegistry())
    monkeypatch.setattr(lifecycle, "_SIGNALS", (signal.SIGUSR1,))
    monkeypatch.setattr(lifecycle, "_start", start)
    monkeypatch.setattr(lifecycle, "_give_up", give_up)
    before = signal.getsignal(signal.SIGUSR1)
    deadline = threading.Timer(60, lambda: None)
    try:
        listener = socket.create_server(("127.0.0.1", 0))
        asyncio.run(lifecycle._serve(ServeSettings(), listener, print, deadline))
        assert deadline.is_alive()
    finally:
        deadline.cancel()
        signal.signal(signal.SIGUSR1, before)


def test_a_promise_beyond_the_data_is_refused_before_the_engine_starts(word_breaker: Path) -> None:
    done = run_to_its_end("--port", "0", "--breaker", str(word_breaker), "--target-fpr", "0.001")
    assert done.returncode == 1
    assert "got target_fpr 0.001 for breaker 'words', whose 300 benign" in done.stderr
    assert "expected one of 0.05, 0.01 or more" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stop_while_loading_is_quick_and_leaves_no_process(word_breaker: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        serve_command("--breaker", str(word_breaker), "--port", str(port)),
        env=server_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not children:
        assert time.monotonic() < deadline, "the engine was never started"
        time.sleep(0.2)
        try:
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=20).json()
        except httpx.TransportError:
            continue
        assert httpx.get(f"http://127.0.0.1:{port}/livez", timeout=20).status_code == 200
        if ready["reason"] == "starting the engine":
            children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ready" not in stdout
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_the_ready_line_says_how_to_try_the_server(server: Server) -> None:
    ready, console, try_it = server.out.read_text().splitlines()
    assert ready.startswith(f"ready: {MODEL} on {server.url}, breaker words ")
    assert ready.endswith(", mode enforce")
    command = try_it.removeprefix("try:   ")
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert '"object":"chat.completion"' in answer.stdout
    key = server.admin["Authorization"].removeprefix("Bearer ")
    assert console == f"console: {server.url}/console  key: {key}"
    assert server.http.get("/v1/breaker/trips").status_code == 403
    assert server.http.get("/v1/breaker/trips", headers=server.admin).status_code == 200
    assert key not in server.err.read_text()


class ScriptedProcess(NamedTuple):
    """`serve` with a script for an engine (scripted.py): what ends it is all real."""

    process: subprocess.Popen[str]
    http: httpx.Client

    def stream(self, **script: Any) -> Any:
        body = {"stream": True, **script}
        return self.http.stream("POST", "/v1/chat/completions", json=body)

    def wait_until(self, status: int, method: str, path: str) -> httpx.Response:
        """The first answer with this status."""
        deadline = time.monotonic() + 20
        while True:
            # A connection of its own: those of a server that stops are closed.
            response = httpx.request(method, self.http.base_url.join(path), json={})
            if response.status_code == status:
                return response
            assert time.monotonic() < deadline, response.text
            time.sleep(0.02)


@contextmanager
def scripted_process(*arguments: str) -> Iterator[ScriptedProcess]:
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("scripted.py")), "--port", "0", *arguments],
        env=server_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{json.loads(process.stdout.readline())}"
            with httpx.Client(base_url=url, timeout=30) as http:
                yield ScriptedProcess(process, http)
        finally:
            process.kill()


def test_at_sigterm_readiness_fails_first_and_running_streams_end_whole() -> None:
    with scripted_process("--drain-delay-s", "0.5", "--shutdown-timeout-s", "30") as server:
        with server.stream(num_events=40, pause_s=0.05) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            reason = server.wait_until(503, "GET", "/readyz").json()["reason"]
            assert reason == "shutting down"
            # In the delay requests are taken, for those who have not noticed yet.
            assert server.wait_until(200, "POST", "/v1/chat/completions").json()["choices"]
            refused = server.wait_until(503, "POST", "/v1/chat/completions")
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"] == "5"
            assert refused.headers["connection"] == "close"
            assert httpx.get(server.http.base_url.join("/livez")).status_code == 200
            said = [line for line in lines if line]
        assert len(said) == 40  # 39 more events, and:
        assert said[-1] == "data: [DONE]"
        assert server.process.wait(20) == 0


def test_a_stream_that_outlasts_the_shutdown_ends_with_an_error() -> None:
    with scripted_process("--shutdown-timeout-s", "2") as server:
        with server.stream(num_events=10_000, pause_s=0.05) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line]
        assert json.loads(said[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert "data: [DONE]" not in said
        assert server.process.wait(20) == 0


def test_a_dead_engine_ends_the_server_after_the_answers_under_way() -> None:
    """With an exit code on which whatever runs a server restarts it."""
    with scripted_process() as server:
        with server.stream(num_events=40, pause_s=0.05) as response:
            lines = response.iter_lines()
            next(lines)
            httpx.post(server.http.base_url.join("/v1/chat/completions"), json={"kills": True})
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert server.process.wait(60) == 1


def test_a_dead_engine_is_a_503_and_fails_the_liveness_probe() -> None:
    """For as long as the last answers take; then the server ends (test_observe.py)."""

    async def test() -> None:
        async with scripted_server() as server:
            server.serving.guarded.errored = True
            assert (await server.http.get("/livez")).status_code == 503
            ready = (await server.http.get("/readyz")).json()
            assert ready["reason"] == "the engine died and the server ends"
            answer = await server.post()
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == ("engine_dead", "server_error")

    asyncio.run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_trip_does_not_hide_that_the_engine_died(stream: bool) -> None:
    """Who may ask again has to know it, whatever became of one choice."""

    async def test() -> None:
        async with scripted_server(EngineServing()) as server:
            answer = await server.post(num_events=4, trips_at=2, dies=True, stream=stream)
            assert '"engine_dead"' in answer.text
            assert '"code":"content_filter"' not in answer.text.replace(" ", "")

    asyncio.run(test())


def test_a_second_sigterm_ends_at_once() -> None:
    endless: dict[str, Any] = {"num_events": 10_000, "pause_s": 0.05}
    with (
        scripted_process("--shutdown-timeout-s", "600") as server,
        server.stream(**endless) as response,
    ):
        lines = response.iter_lines()  # kept, or the connection would be closed
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(503, "GET", "/readyz")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 128 + signal.SIGTERM
