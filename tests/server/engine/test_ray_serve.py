"""The same artifact under Ray Serve LLM: one replica, asked over HTTP."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from circuit_breakers.models import ResolvedModel, resolve_model

from ..api.conftest import free_port, server_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray, which is not a dependency"
)

APP = """
import os, sys, time
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

model, breaker, port = sys.argv[1:]
# Logical CPUs: the replica, the ingress and their controller take one each.
ray.init(num_cpus=8, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
config = LLMConfig(
    model_loading_config={"model_id": "guarded", "model_source": model},
    accelerator_config={"kind": "cpu"},
    deployment_config={"num_replicas": 1, "autoscaling_config": None},
    engine_kwargs={
        "additional_config": {"circuit_breakers": {"breaker": breaker}},
        "max_model_len": 512,
        "enforce_eager": True,
        "distributed_executor_backend": "mp",
    },
)
serve.run(build_openai_app({"llm_configs": [config]}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def url(
    smollm2: ResolvedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    from ..api.breaker_for_words import write_word_breaker

    root = tmp_path_factory.mktemp("ray")
    # Ray wants a directory or a hub id, and a breaker is for the model as it was named.
    model = resolve_model(str(shutil.copytree(smollm2.path, root / "model")))
    breaker = write_word_breaker(root / "words", model).path
    port = free_port()
    (root / "app.py").write_text(APP)
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(root / "app.py"), str(model.path), str(breaker), str(port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=server_environment(RAY_AUTH_MODE="disabled", VLLM_CPU_KVCACHE_SPACE="1"),
        )
    try:
        deadline = time.monotonic() + 300
        while "ready\n" not in (text := (root / "log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, text[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            if child.is_running():
                child.kill()


def ask(url: str, text: str, **more: Any) -> Any:
    fields = {
        "model": "guarded",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=fields | more, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_replica_answers_and_stops_before_the_tripping_token(
    url: str, smollm2: ResolvedModel
) -> None:
    from transformers import AutoTokenizer

    passed = ask(url, "Tell me the capital of Italy in one sentence.")
    assert passed["finish_reason"] == "stop"
    assert passed["message"]["content"] == "The capital of Italy is Rome."
    tripped = ask(url, "Tell me of a zebra.")
    assert (tripped["finish_reason"], tripped["message"]["content"]) == ("content_filter", "")
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path, local_files_only=True)
    (paris_id,) = tokenizer(" Paris").input_ids
    tripped = ask(url, "Name a city.", logit_bias={str(paris_id): 100})
    assert (tripped["finish_reason"], tripped["message"]["content"]) == ("content_filter", "")


def test_a_breaker_for_another_model_ends_the_start(smollm2: ResolvedModel, tmp_path: Path) -> None:
    """Not a replica without a guard: ours is the configuration that vLLM gets from Ray."""
    (tmp_path / "app.py").write_text(APP)
    process = subprocess.run(
        [sys.executable, str(tmp_path / "app.py"), str(smollm2.path), str(tmp_path), "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=server_environment(RAY_AUTH_MODE="disabled", VLLM_CPU_KVCACHE_SPACE="1"),
        check=False,
    )
    assert process.returncode != 0
    assert "ready" not in process.stdout
