"""No token leaves before it is scored and passed: thousands of streams, seen from outside.

The client here trusts nothing that the guard says. It takes what vLLM's output processor streams
and asks transformers whether any token of it should never have been there.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from circuit_breakers.engine import scheduler as scheduler_module
from circuit_breakers.engine.scheduler import SchedulerGuard
from circuit_breakers.guard.aggregation import aggregate

from .tiny import TOLERANCE, VOCAB, Rig, core_of

NUM_STREAMS = 600
"""For each of the engine's modes."""


class Client:
    """What one client was sent, step by step."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.finish_reason: str | None = None

    def receive(self, completion: Any) -> None:
        assert self.finish_reason is None, "nothing comes after the end"
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs or []
        self.finish_reason = completion.finish_reason


@contextmanager
def thresholds(rig: Rig, values: tuple[float, ...]) -> Iterator[None]:
    guard = core_of(rig.llm).scheduler._circuit_breakers
    before = guard.policy
    probes = tuple(
        p.model_copy(update={"threshold_logit": v})
        for p, v in zip(before.probes, values, strict=True)
    )
    guard.policy = dataclasses.replace(before, probes=probes)
    try:
        yield
    finally:
        guard.policy = before


def stream(rig: Rig, num_streams: int, seed: int) -> list[Client]:
    """Streams of random prompts, sampled at temperature 1, as many at once as the engine takes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = np.random.default_rng(seed)
    engine = rig.llm.llm_engine
    clients: dict[str, Client] = {}
    for i in range(num_streams):
        prompt = rng.integers(10, VOCAB, rng.integers(2, 12)).tolist()
        clients[str(i)] = Client(prompt)
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=int(rng.integers(1, 40)),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            clients[output.request_id].receive(output.outputs[0])
    return list(clients.values())


def middling_thresholds(rig: Rig) -> tuple[float, ...]:
    """Reached by about half of the streams, at any point of prompt or completion."""
    probes = core_of(rig.llm).scheduler._circuit_breakers.policy.probes
    peaks = []
    for client in stream(rig, 120, seed=0):
        logit_TP = rig.oracle(client.prompt + client.token_ids)
        peaks.append([aggregate(logit_TP[:, k], p.aggregation).max() for k, p in enumerate(probes)])
    return tuple(float(v) for v in np.quantile(peaks, 0.75, axis=0))


def leaks(rig: Rig, client: Client, values: tuple[float, ...]) -> int:
    """Delivered tokens that a fresh forward says should have been withheld."""
    probes = core_of(rig.llm).scheduler._circuit_breakers.policy.probes
    logit_TP = rig.oracle(client.prompt + client.token_ids)
    over_T = np.zeros(len(logit_TP), bool)
    for k, (probe, value) in enumerate(zip(probes, values, strict=True)):
        over_T |= aggregate(logit_TP[:, k], probe.aggregation) >= value + TOLERANCE
    first = int(over_T.argmax()) if over_T.any() else len(over_T)
    return min(len(over_T) - first, len(client.token_ids))


def test_no_stream_gets_a_token_at_or_past_its_trip(rig: Rig) -> None:
    values = middling_thresholds(rig)
    rig.recorder.clear()
    with thresholds(rig, values):
        clients = stream(rig, NUM_STREAMS, seed=1)
        assert sum(leaks(rig, client, values) for client in clients) == 0
    for request_id in rig.recorder.prompts:
        rig.recorder.check_order(request_id)
    for client in clients:
        assert client.finish_reason is not None
        assert len(client.logprobs) == len(client.token_ids), "no logprob of a withheld token"
    reasons = Counter(client.finish_reason for client in clients)
    assert min(reasons["content_filter"], reasons["length"]) > NUM_STREAMS / 6
    trips_at = {len(c.token_ids) for c in clients if c.finish_reason == "content_filter"}
    assert len(trips_at & set(range(12))) >= 9, "trips must come at any point"


def test_the_client_sees_a_broken_hold_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is not blind: one line of the hold-back changed, and the client knows."""
    held = "stream.held = output\n"
    source = textwrap.dedent(inspect.getsource(SchedulerGuard.release))
    assert source.count(held) == 1
    broken = source.replace(
        held, "released.append(send_scored(stream, output, stream.num_judged))\n"
    )
    names: dict[str, Any] = {}
    exec(broken, vars(scheduler_module), names)
    values = middling_thresholds(rig)
    rig.recorder.clear()
    monkeypatch.setattr(SchedulerGuard, "release", names["release"])
    with thresholds(rig, values):
        clients = stream(rig, 180, seed=2)
    num_tripped = sum(c.finish_reason == "content_filter" and bool(c.token_ids) for c in clients)
    assert num_tripped > 10
    assert sum(leaks(rig, client, values) > 0 for client in clients) >= num_tripped - 1
