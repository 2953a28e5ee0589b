"""A real server with keys and an audit log, which comes back on the same port and the same log."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# As in tests/conftest.py, before anything imports torch: engines that share few cores crawl with
# more threads than one, or pinned to the first core.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import psutil
from typer.testing import CliRunner

from circuit_breakers.cli import app
from circuit_breakers.models import resolve_model

from ..replicas.replica import Replica
from ..server.api.breaker_for_words import write_word_breaker
from ..server.api.governed_app import SECRET, key_table
from .disk import small_disk

__all__ = ["KEY", "LIMITED_KEY", "House", "open_house", "wait_until"]

KEY, LIMITED_KEY = "user", "limited"
LIMIT_PER_MINUTE = 60
_WAIT_S = 120
_START_S = 900
"""A busy machine may take minutes."""


class House:
    """The server, its folder and its log."""

    def __init__(self, root: Path, log: Path, *, has_small_disk: bool) -> None:
        """Nothing is started yet. The breaker is the one for words."""
        self.root, self.log = root, log
        self.database = self.log / "audit.db"
        self.has_small_disk = has_small_disk
        """The log's folder is a disk of its own, which can be filled."""
        model = resolve_model("smollm2-135m-instruct")
        self.breaker = write_word_breaker(root / "words", model).path
        limits = f"limits = {{ requests_per_minute = {LIMIT_PER_MINUTE} }}"
        tables = ("[policies.default]\n", key_table(KEY), key_table(LIMITED_KEY, limits))
        (root / "policies.toml").write_text('default = "default"\n' + "\n".join(tables))
        (root / "pepper").write_text(SECRET)
        self.wrong: list[str] = []
        """What a fault has found that must not be."""
        self._replica: Replica | None = None
        self._started_with: tuple[tuple[str, ...], dict[str, str]] = (), {}

    def be_up(self, *arguments: str, env: dict[str, str]) -> None:
        """A server with these arguments is ready on return; one with others is ended first."""
        wanted = arguments, env
        if self._replica is not None and wanted != self._started_with:
            self.server.leave()
            self._replica = None
        self._started_with = wanted
        if self._replica is None:
            self.start()

    def start(self) -> None:
        """Another process on the same port and log; ready on return."""
        if self._replica is None:
            arguments, env = self._started_with
            self._replica = Replica(
                self.root,
                *("--breaker", str(self.breaker), "--score-traces"),
                *("--audit-db", str(self.database)),
                *("--policies", str(self.root / "policies.toml")),
                *("--pepper-file", str(self.root / "pepper"), *arguments),
                env=env,
            )
        else:
            self._replica.start()
        self._replica.wait_until_ready(_START_S)

    def expect(self, what: str, got: object, expected: object) -> None:
        """Keeps a figure that is not the one that has to be."""
        if got != expected:
            self.wrong.append(f"{what}: got {got}, expected {expected}")

    @property
    def server(self) -> Replica:
        assert self._replica is not None, "start() comes first"
        return self._replica

    def processes(self) -> list[psutil.Process]:
        """The API process first, then those of the engine."""
        api = psutil.Process(self.server.process.pid)
        return [api, *api.children(recursive=True)]

    def trips(self, database: Path | None = None) -> list[str]:
        """Ids of the requests whose trips the log has, one for each trip."""
        file = database or self.database
        with contextlib.closing(sqlite3.connect(file, timeout=_WAIT_S)) as db:
            rows = db.execute("SELECT request_id FROM audit_log WHERE kind = 'trip' ORDER BY seq")
            return [request_id for (request_id,) in rows]

    def verify(self) -> str:
        """What `circuit-breakers audit verify` says of the log, its exit code in front."""
        done = CliRunner().invoke(app, ["audit", "verify", "--db", str(self.database)])
        return f"exit {done.exit_code}: {done.output.strip()}"


@contextmanager
def open_house(root: Path) -> Iterator[House]:
    """A house whose processes do not outlive the context."""
    log = root / "audit"
    log.mkdir()
    with small_disk(log) as has_small_disk:
        house = House(root, log, has_small_disk=has_small_disk)
        try:
            yield house
        finally:
            if house._replica is not None and house.server.process.poll() is None:
                house.server.die()


def wait_until(holds: Callable[[], bool], timeout_s: float = _WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
