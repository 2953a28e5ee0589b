"""Fixtures of general use: the offline environment, the real built-in model and a real server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports huggingface_hub, torch or vllm, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Read once by OpenMP when torch loads; the in-process engine crawls with more threads than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each engine would pin itself to the first core, also where another test runs there.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import hypothesis
import pytest

from circuit_breakers.models import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from .clients.conftest import Guarded
    from .server.api.conftest import Server


# A loaded machine is no bug: nothing here asserts on time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


_TOGETHER = {
    "clients": "servers",
    "console": "servers",
    "docs": "servers",
    "security": "servers",
    "server/api": "servers",
    "server/cli": "servers",
    "server/test_cli.py": "servers",
    "docker/test_live_monitoring.py": "servers",
    "docker": "deployment",
    "helm": "deployment",
    "replicas": "deployment",
    "server/engine": "engine",
    "training/attack/test_search.py": "servers",
    "training/gate/test_gate.py": "servers",
    "training/gate/test_gate_arguments.py": "servers",
    "training": "training",
}
"""Below tests: what shares servers, engines or models, and so has to run in one process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where a run in several processes is split; all else by file."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0].removeprefix("tests/")
            return next((v for k, v in _TOGETHER.items() if f"{path}/".startswith(f"{k}/")), path)

    return Together(config, log)


@pytest.fixture(scope="session")
def smollm2() -> ResolvedModel:
    """SmolLM2-135M-Instruct, converted once into the user's model cache and shared by all runs."""
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def word_breaker(smollm2: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .server.api.breaker_for_words import write_word_breaker

    out = tmp_path_factory.mktemp("breaker") / "words"
    return write_word_breaker(out, smollm2).path


@pytest.fixture(scope="session")
def server(word_breaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in enforce mode, one for all tests of a run; its end is checked too."""
    import psutil

    from .server.api.conftest import POLICIES, Server, end_amid_streams

    root = tmp_path_factory.mktemp("enforce")
    (root / "policies.toml").write_text(POLICIES)
    server = Server(
        word_breaker,
        root,
        *("--tool-call-parser", "hermes", "--policies", str(root / "policies.toml")),
        "--console",
    )
    try:
        server.wait_until_ready()
        yield server
        children = server.children()
        end_amid_streams(server)
    finally:
        exit_code = server.stop()
    assert exit_code == 0, server.err.read_text()[-3000:]
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, "the engine outlived its server"


@pytest.fixture(scope="session")
def guarded(word_breaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with API keys, one for all tests of clients and documentation."""
    from .clients.conftest import Guarded, write_policies
    from .server.api.conftest import Server

    root = tmp_path_factory.mktemp("clients")
    server = Server(word_breaker, root, *write_policies(root))
    try:
        server.wait_until_ready()
        yield Guarded(f"{server.url}/v1", audit_db=server.audit_db)
    finally:
        server.stop()
