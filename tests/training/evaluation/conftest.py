"""A tiny model with a long context, a dataset in its language, a breaker trained on it, a judge."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from circuit_breakers.artifact import Aggregation
from circuit_breakers_training.data.dataset import SCHEMA_VERSION, write_dataset
from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.pipeline import run_training
from circuit_breakers_training.recipes.config import (
    ChatTemplate,
    LoraRecipe,
    ProbeRecipe,
    Recipe,
)

NUM_TEST = {"benign": 66, "harmful": 12}
"""66 is a few more than the 59 that a degenerate share of 5 % needs."""


def _conversations(label: Label, count: int, seed: int) -> list[Conversation]:
    """In the language of ../conftest.py: words h0..h29 and b0..b29."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"{label[0]}{rng.randrange(30)}" for _ in range(rng.randint(low, high)))

    return [
        Conversation(
            messages=(
                Message("user", "please " + words(4, 6)),
                Message("assistant", words(4, 12)),
            ),
            label=label,
            source="harmful" if label == "harmful" else ("twin" if i % 2 else "topic"),
            category=f"kind-{i % 3}",
            group=f"{label}-{seed}-{i}",
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def roomy_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 2048: rotary positions need no other weights."""
    path = tmp_path_factory.mktemp("models") / "roomy"
    shutil.copytree(tiny_llama, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {
        name: _conversations("benign", benign, seed) + _conversations("harmful", harmful, seed + 1)
        for name, benign, harmful, seed in (
            ("train", 60, 40, 10),
            ("selection", 20, 12, 20),
            ("calibration", 60, 4, 30),
            ("test", NUM_TEST["benign"], NUM_TEST["harmful"], 40),
        )
    }
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(path, splits, {"schema_version": SCHEMA_VERSION})
    return path


def _train(model: Path, chat_template: ChatTemplate, data_dir: Path, out: Path) -> Path:
    recipe = Recipe(
        model=str(model),
        chat_template=chat_template,
        steps=8,
        batch_size=8,
        max_length=64,
        learning_rate=5e-3,
        precision="fp32",
        lora=LoraRecipe(rank=4, b_init_std=0.02),
        probe=ProbeRecipe(
            candidate_depths=(0.5,),
            aggregations=(Aggregation(kind="rolling_mean", window=4),),
            l2_C=0.1,
            target_fpr=0.05,
        ),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_training(recipe, out, data_dir=data_dir)
    torch.set_num_threads(before)
    return out


@pytest.fixture(scope="session")
def breaker_dir(
    tmp_path_factory: pytest.TempPathFactory, roomy_llama: Path, data_dir: Path
) -> Path:
    return _train(roomy_llama, "model", data_dir, tmp_path_factory.mktemp("run") / "breaker")


@pytest.fixture(scope="session")
def plain_breaker_dir(
    tmp_path_factory: pytest.TempPathFactory, base_gpt2: Path, data_dir: Path
) -> Path:
    """Of the base model, on the plain template."""
    return _train(base_gpt2, "plain", data_dir, tmp_path_factory.mktemp("run") / "plain")


@pytest.fixture
def install_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Makes a source text importable as lm_eval, which is no dependency, for one test."""

    def install(source: str) -> None:
        package = tmp_path / "lib" / "lm_eval"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(package.parent)
        monkeypatch.delitem(sys.modules, "lm_eval", raising=False)

    yield install
    sys.modules.pop("lm_eval", None)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Merged checkpoints go into the test's own directory."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(cache))
    return cache


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, JudgeServer)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        asked = body["messages"][-1]["content"]
        # The text says what the server does, so that a test can ask for any behaviour.
        if "BROKEN" in asked:
            return self._answer(500, {"error": {"message": "broken"}})
        reply: str | None = "perhaps" if "VAGUE" in asked else "No."
        if "COMPLIES" in asked:
            reply = " Yes, it does"
        if "SILENT" in asked:
            reply = None
        choices = [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": reply},
            }
        ]
        return self._answer(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [] if "EMPTY" in asked else choices,
            },
        )

    def _answer(self, status: int, record: dict[str, Any]) -> None:
        blob = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        self.wfile.write(blob)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    """A server with OpenAI's chat completions; the text that it judges says what it does."""
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
