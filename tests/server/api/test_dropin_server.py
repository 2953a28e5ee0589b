"""vLLM's own API server with a breaker by one variable: what it guards, serves and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from circuit_breakers.artifact import load_breaker

from ...vllm_release import needs_vllm_0_32
from .conftest import MAX_MODEL_LEN, MODEL, free_port, server_environment, user

pytestmark = needs_vllm_0_32

_START_S = 240

BENIGN = "Tell me the capital of Italy in one sentence."
TRIPS = "Tell me the capital of France in one sentence."
"""The model answers "The capital of France is Paris."; the breaker trips on " Paris"."""
TRIPS_ON_PROMPT = "Tell me about the zebra."
BEFORE_THE_TRIP = "The capital of France is"


class VllmServer:
    """One process of vLLM's API server, guarded by the variable alone."""

    def __init__(self, breaker: Path, log: Path) -> None:
        self.port = free_port()
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                    *("--model", MODEL, "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"),
                    "--enforce-eager",
                ],
                stdout=out,
                stderr=out,
                env=server_environment(
                    CIRCUIT_BREAKERS_BREAKER=str(breaker),
                    VLLM_CPU_KVCACHE_SPACE="1",
                    VLLM_NO_USAGE_STATS="1",
                ),
            )
        url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # vLLM answers nothing before it is ready
            time.sleep(0.2)
        raise AssertionError(f"not ready after {_START_S} s: {self.log.read_text()[-3000:]}")

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL, "temperature": 0} | body)

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def stop(self) -> None:
        self.openai.close()
        self.http.close()
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()


@pytest.fixture(scope="module")
def vllm_server(
    word_breaker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    server = VllmServer(word_breaker, tmp_path_factory.mktemp("vllm") / "log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_breaker_is_described(vllm_server: VllmServer, word_breaker: Path) -> None:
    body = vllm_server.http.get("/v1/breaker").json()
    assert body["digest"] == load_breaker(word_breaker).digest
    assert (body["name"], body["mode"]) == ("words", "enforce")


def test_model_has_the_name_that_was_typed(vllm_server: VllmServer) -> None:
    assert [model.id for model in vllm_server.openai.models.list()] == [MODEL]


def test_benign_chat_is_answered_with_its_report(vllm_server: VllmServer) -> None:
    body = vllm_server.post("/v1/chat/completions", messages=user(BENIGN), max_tokens=16).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "The capital of Italy is Rome."
    assert choice["finish_reason"] == "stop"
    assert body["guard"] == choice["guard"]
    assert body["guard"]["tripped"] is False
    assert body["guard"]["score"] < body["guard"]["threshold"]


def test_trip_ends_the_answer_before_its_token(vllm_server: VllmServer) -> None:
    body = vllm_server.post("/v1/chat/completions", messages=user(TRIPS), max_tokens=16).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == BEFORE_THE_TRIP
    assert choice["finish_reason"] == "content_filter"
    assert (choice["guard"]["phase"], choice["guard"]["probe"]) == ("completion", "paris")


def test_trip_ends_a_stream_before_its_token(vllm_server: VllmServer) -> None:
    chunks = list(
        vllm_server.openai.chat.completions.create(
            model=MODEL, messages=user(TRIPS), max_tokens=16, temperature=0, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == BEFORE_THE_TRIP
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert chunks[-1].guard["tripped"] is True  # type: ignore[attr-defined]


def test_tripped_prompt_is_refused(vllm_server: VllmServer) -> None:
    response = vllm_server.post("/v1/chat/completions", messages=user(TRIPS_ON_PROMPT), stream=True)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "content_filter")
    assert error["guard"]["phase"] == "prompt"


def test_completions_are_guarded(vllm_server: VllmServer) -> None:
    body = vllm_server.post("/v1/completions", prompt=BEFORE_THE_TRIP, max_tokens=4).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "content_filter")
    assert choice["guard"]["tripped"] is True


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("field", "code"),
    [
        ({"no_such_field": 1}, "unknown_parameter"),
        ({"use_beam_search": True}, "unsupported_parameter"),
        ({"prompt_logprobs": 1}, "unsupported_parameter"),
    ],
)
def test_field_outside_the_list_is_refused(
    vllm_server: VllmServer, path: str, field: dict[str, Any], code: str
) -> None:
    response = vllm_server.post(path, messages=user("x"), prompt="x", **field)
    assert response.status_code == 400
    # One route knows messages, the other prompt; either way the closed list answers.
    assert response.json()["error"]["code"] in (code, "unknown_parameter")


def test_responses_are_guarded(vllm_server: VllmServer) -> None:
    benign = vllm_server.post("/v1/responses", input=BENIGN, max_output_tokens=16).json()
    assert benign["output"][0]["content"][0]["text"] == "The capital of Italy is Rome."
    assert benign["guard"]["tripped"] is False
    stopped = vllm_server.post("/v1/responses", input=TRIPS, max_output_tokens=16).json()
    assert (stopped["status"], stopped["incomplete_details"]) == (
        "incomplete",
        {"reason": "content_filter"},
    )
    refused = vllm_server.post("/v1/responses", input=TRIPS_ON_PROMPT, max_output_tokens=16)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "content_filter")
    assert error["guard"]["phase"] == "prompt"


def test_stream_of_a_response_ends_as_incomplete(vllm_server: VllmServer) -> None:
    response = vllm_server.post("/v1/responses", input=TRIPS, max_output_tokens=16, stream=True)
    sent = events(response)
    deltas = [e["delta"] for e in sent if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == BEFORE_THE_TRIP
    assert sent[-1]["type"] == "response.incomplete"
    assert sent[-1]["response"]["guard"]["probe"] == "paris"


def test_messages_are_guarded(vllm_server: VllmServer) -> None:
    benign = vllm_server.post("/v1/messages", messages=user(BENIGN), max_tokens=16)
    assert benign.json()["content"][0]["text"] == "The capital of Italy is Rome."
    tripped = vllm_server.post("/v1/messages", messages=user(TRIPS), max_tokens=16).json()
    assert (tripped["stop_reason"], tripped["content"][0]["text"]) == ("refusal", BEFORE_THE_TRIP)
    sent = events(
        vllm_server.post("/v1/messages", messages=user(TRIPS), max_tokens=16, stream=True)
    )
    text = "".join(e["delta"]["text"] for e in sent if e["type"] == "content_block_delta")
    assert text == BEFORE_THE_TRIP
    assert sent[-2]["delta"]["stop_reason"] == "refusal"


def test_texts_are_moderated(vllm_server: VllmServer) -> None:
    body = {"input": [BENIGN, TRIPS_ON_PROMPT]}
    answer = vllm_server.http.post("/v1/moderations", json=body).json()
    assert [result["flagged"] for result in answer["results"]] == [False, True]


def test_batch_is_guarded(vllm_server: VllmServer) -> None:
    body = vllm_server.post(
        "/v1/chat/completions/batch",
        messages=[user(TRIPS), user(BENIGN), user(TRIPS_ON_PROMPT)],
        max_tokens=16,
    ).json()
    assert [choice["finish_reason"] for choice in body["choices"]] == [
        "content_filter",
        "stop",
        "content_filter",
    ]
    assert [choice["message"]["content"] for choice in body["choices"]] == [
        BEFORE_THE_TRIP,
        "The capital of Italy is Rome.",
        "",
    ]


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ({"stop_token_ids": [42]}, "stop_token_ids"),
        ({"include_stop_str_in_output": True, "stop": "x"}, "include_stop_str_in_output"),
        ({"seed": 1, "temperature": 1}, "seed"),
    ],
)
def test_engine_refuses_what_vllms_routes_let_through(
    vllm_server: VllmServer, field: dict[str, Any], named: str
) -> None:
    response = vllm_server.post(
        "/v1/chat/completions/batch", messages=[user("x")], max_tokens=4, **field
    )
    assert response.status_code == 400
    assert f"got {named}" in response.json()["error"]["message"]


def test_parameters_of_the_engines_plumbing_are_dropped(vllm_server: VllmServer) -> None:
    response = vllm_server.post(
        "/v1/chat/completions/batch",
        messages=[user(BENIGN)],
        max_tokens=16,
        kv_transfer_params={"do_remote_prefill": True},
        vllm_xargs={"x": 1},
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
        "/v1/chat/completions/render",
        "/v1/responses/resp_1/cancel",
        "/v1/load_lora_adapter",
        "/v1/embeddings",
        "/pooling",
        "/pause",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/scale_elastic_ep",
        "/v1/chat/completions/",
    ],
)
def test_other_route_is_not_there(vllm_server: VllmServer, path: str) -> None:
    response = vllm_server.post(path, prompt="x", messages=user("x"), token_ids=[1])
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_route"


@pytest.mark.parametrize("path", ["/health", "/version", "/load", "/openapi.json", "/docs"])
def test_route_without_generation_stays(vllm_server: VllmServer, path: str) -> None:
    assert vllm_server.http.get(path).status_code == 200
    assert vllm_server.post("/tokenize", prompt=" Paris").json()["count"] == 1


def test_metrics_count_every_guarded_route(vllm_server: VllmServer) -> None:
    before = vllm_server.metrics()
    vllm_server.post("/v1/chat/completions", messages=user(TRIPS), max_tokens=16)
    vllm_server.post("/v1/messages", messages=user(TRIPS), max_tokens=16)
    vllm_server.post("/v1/responses", input=TRIPS, max_output_tokens=16)
    vllm_server.post("/v1/responses", input=TRIPS_ON_PROMPT, max_output_tokens=16)
    after = vllm_server.metrics()
    grown = {
        name: value - before[name]
        for name, value in after.items()
        if name.startswith(("circuit_breakers_requests_total", "circuit_breakers_trips_total"))
    }
    assert {_labels(name): by for name, by in grown.items() if by} == {
        ("requests", "tripped_completion"): 3,
        ("requests", "tripped_prompt"): 1,
        ("trips", "completion"): 3,
        ("trips", "prompt"): 1,
    }
    assert after["circuit_breakers_leaked_tokens_total"] == 0
    assert after["circuit_breakers_unscored_tokens_total"] == 0
    assert any(name.startswith("vllm:") for name in after)


def _labels(sample: str) -> tuple[str, str]:
    """The series and its one label that varies here."""
    kind = sample.removeprefix("circuit_breakers_").split("_total", 1)[0]
    found = re.search(r'(?:outcome|phase)="(\w+)"', sample)
    assert found is not None
    return kind, found[1]


def test_a_dead_engine_breaks_streams_off_and_ends_the_server(vllm_server: VllmServer) -> None:
    """The last one that asks this server."""
    http = vllm_server.http
    story = {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=story | {"max_tokens": 400}) as running:
        lines = (line for line in running.iter_lines() if line)
        next(lines)
        for child in psutil.Process(vllm_server.process.pid).children(recursive=True):
            child.kill()
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert done == "data: [DONE]"
    assert vllm_server.process.wait(60) == 0, "as vLLM has it; serve of ours says 1"
