"""Real servers as subprocesses, on a breaker for words; the one in enforce mode is all tests'."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from circuit_breakers.models import ResolvedModel

from .breaker_for_words import LOOSE_FPR, write_rank_1_adapter

MODEL = "smollm2-135m-instruct"
LORA = "style"
MAX_MODEL_LEN = 512
REFUSAL = "No, sorry."
POLICIES = f"""
default = "default"
[policies.default]
[policies.nothing]
threshold = -1000
[policies.refusing]
action = "refuse"
refusal = "{REFUSAL}"
[policies.failing]
action = "error"
[policies.watching]
mode = "observe"
[policies.late]
phases = ["completion"]
"""
"""Without keys, so that nobody has to bring one."""
_START_S = 240
_LONG = 64
"""Tokens of an answer that is still on its way when the server has noticed a signal."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what other tests set for engines inside of it."""
    inside = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE")
    return {k: v for k, v in os.environ.items() if k not in inside} | extra


def serve_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "circuit_breakers.cli", "serve", *arguments]


class Server:
    """One `circuit-breakers serve` process."""

    def __init__(self, breaker: Path, log_dir: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.policies = log_dir / "policies.toml"
        """Its policy file, where `arguments` name one."""
        self.out = log_dir / "stdout"
        self.err = log_dir / "stderr"
        self.audit_db = log_dir / "audit.db"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                serve_command(
                    *("--breaker", str(breaker), "--port", str(self.port)),
                    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"),
                    *("--kv-cache-gib", "1"),
                    *("--audit-db", str(self.audit_db), "--score-traces", *arguments),
                ),
                stdout=out,
                stderr=err,
                env=server_environment(),
            )
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.err.read_text()[-3000:]
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # the port is not bound yet
            time.sleep(0.2)
        raise AssertionError(f"not ready after {_START_S} s: {self.err.read_text()[-3000:]}")

    @property
    def admin(self) -> dict[str, str]:
        """Headers with the key of its console, where it was started with one."""
        found = re.search(r"^console: \S+  key: (\S+)$", self.out.read_text(), re.MULTILINE)
        assert found is not None
        return {"Authorization": f"Bearer {found[1]}"}

    def children(self) -> list[psutil.Process]:
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def metrics(self) -> dict[str, float]:
        """Samples by name and sorted labels, e.g. 'a_total{x="1",y="2"}'."""
        lines = self.http.get("/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {_sorted_labels(name): float(value) for name, value in samples}

    def stop(self) -> int:
        """Ends the server by SIGTERM; its exit code."""
        self.openai.close()
        self.http.close()
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def end_amid_streams(server: Server) -> None:
    """SIGTERM while two answers are on their way: not ready at once, and both come whole."""
    with ExitStack() as opened:
        streams = [
            opened.enter_context(
                server.openai.chat.completions.create(
                    model=MODEL,
                    messages=user("Tell me a story."),
                    temperature=0,
                    max_tokens=_LONG,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
            )
            for _ in range(2)
        ]
        for stream in streams:
            next(stream)
        server.process.terminate()
        deadline = time.monotonic() + 20
        # A connection of its own: those that are idle are closed.
        while (ready := httpx.get(f"{server.url}/readyz")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ready.json()["reason"] == "shutting down"
        for stream in streams:
            *_, end, usage = stream
            assert end.choices[0].finish_reason == "length"
            assert (end.choices[0].model_extra or {})["guard"]["tripped"] is False
            assert usage.usage.completion_tokens == _LONG
    server.process.wait(60)


def _sorted_labels(name: str) -> str:
    bare, _, labels = name.partition("{")
    pairs = sorted(re.findall(r'\w+="[^"]*"', labels))
    return f"{bare}{{{','.join(pairs)}}}" if pairs else bare


@pytest.fixture(scope="module")
def observing_server(
    smollm2: ResolvedModel, word_breaker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server in observe mode, with a LoRA of the operator's and a looser promise than the
    breaker's own; ended with its module."""
    root = tmp_path_factory.mktemp("observe")
    lora = write_rank_1_adapter(root / "lora", smollm2, 200.0)
    server = Server(
        word_breaker,
        root,
        *("--mode", "observe", "--lora", f"{LORA}={lora}"),
        *("--target-fpr", str(LOOSE_FPR)),
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
