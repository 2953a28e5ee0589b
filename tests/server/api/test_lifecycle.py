"""Starts that fail do so with one message, starts that are interrupted leave nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from circuit_breakers.api.lifecycle import load_parts
from circuit_breakers.errors import ArtifactError, BreakerMismatchError, ConfigError, ModelError
from circuit_breakers.models import ResolvedModel
from circuit_breakers.settings import ServeSettings

from .conftest import MODEL, Server, free_port, serve_command, server_environment


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
    ready, try_it = server.out.read_text().splitlines()
    assert ready.startswith(f"ready: {MODEL} on {server.url}, breaker words ")
    assert ready.endswith(", mode enforce")
    command = try_it.removeprefix("try:   ")
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert '"object":"chat.completion"' in answer.stdout
