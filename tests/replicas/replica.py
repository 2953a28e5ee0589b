"""Servers on fixed ports, and nginx before them with the chart's own configuration."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from ..server.api.conftest import free_port, serve_command, server_environment

__all__ = ["Replica", "nginx_before", "samples"]

_START_S = 240
_CONF = Path(__file__).parents[2] / "helm" / "router" / "nginx.conf"


class Replica:
    """One `circuit-breakers serve`, which comes back on the same port when it is started again."""

    def __init__(self, log_dir: Path, *arguments: str, env: dict[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._err = log_dir / f"stderr-{self.port}"
        self._command = serve_command(
            *("--port", str(self.port), "--max-model-len", "512", "--max-num-seqs", "8"),
            *("--kv-cache-gib", "1", *arguments),
        )
        self._env = server_environment(**env)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self._err.open("a") as err:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.DEVNULL, stderr=err, env=self._env
            )
        return self.process

    def wait_until_ready(self, timeout_s: float = _START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._err.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # the port is not bound yet
            time.sleep(0.3)
        raise AssertionError(f"not ready after {timeout_s} s: {self._err.read_text()[-3000:]}")

    def die(self) -> None:
        """kill -9 of the API process; the engine's own end by themselves."""
        engine = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(30)
        _, alive = psutil.wait_procs(engine, timeout=60)
        for process in alive:
            process.kill()
        assert not alive, f"{len(alive)} processes outlived their server"

    def leave(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(120)

    def samples(self) -> dict[str, float]:
        return samples(httpx.get(f"{self.url}/metrics", timeout=30).text)


def samples(page: str) -> dict[str, float]:
    """Sums over the labels, by name, of a page of metrics."""
    sums: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            bare = name.partition("{")[0]
            sums[bare] = sums.get(bare, 0.0) + float(value)
    return sums


@contextmanager
def nginx_before(
    ports: Sequence[int], program: Path, root: Path, max_requests_per_address: int = 128
) -> Iterator[str]:
    """URL of an nginx with helm/router/nginx.conf, whose addresses alone are other ones."""
    own_port = free_port()
    servers = " ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)
    conf = _CONF.read_text()
    for pattern, text in (
        # No name server here: the addresses are given, and stay when a server has gone.
        (r"resolver \{\{.*", ""),
        (r"server \{\{.*resolve max_fails=0;", servers),
        (r"listen 8080;", f"listen 127.0.0.1:{own_port};"),
        (r"\{\{ add \(include \"cb.requestTimeoutS\".*\}\}", "1810"),
        (r"\{\{ include \"cb.maxBodyBytes\" \. \}\}", "4194304"),
        (r"\{\{ \.Values\.router\.maxRequestsPerAddress \}\}", str(max_requests_per_address)),
        (r"/tmp/", f"{root}/"),
    ):
        conf, num = re.subn(pattern, text, conf)
        assert num > 0, f"{pattern} is not in nginx.conf"
    assert "{{" not in conf
    path = root / "nginx.conf"
    path.write_text(conf)
    user = " user root;" if os.geteuid() == 0 else ""
    log = root / "nginx.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            [program, "-p", root, "-c", path, "-e", "stderr", "-g", f"daemon off;{user}"],
            stderr=err,
        )
    url = f"http://127.0.0.1:{own_port}"
    try:
        _wait_until_it_answers(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            assert httpx.get(f"{url}/router-livez").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"nginx does not answer: {log.read_text()}")
