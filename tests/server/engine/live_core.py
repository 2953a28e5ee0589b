"""A live engine core: its thresholds lowered, and all that leaves it recorded."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from circuit_breakers.guard.decision import Mode

__all__ = ["Recorder", "greedy", "recording", "run", "thresholds"]


class Recorder:
    """What leaves the engine core, by request: tokens released and scores that came with them."""

    def __init__(self) -> None:
        self.num_tokens: dict[str, int] = defaultdict(int)
        self.num_scores: dict[str, int] = defaultdict(int)
        self.violations: list[str] = []

    def see(self, outputs: dict[int, Any], num_prompt_tokens: Callable[[str], int]) -> None:
        for engine_outputs in outputs.values():
            for output in engine_outputs.outputs:
                request_id = output.request_id
                start, num_probes, raw, _trip = output.kv_transfer_params["circuit_breakers"]
                assert start == self.num_scores[request_id], "scores come in order, once each"
                self.num_scores[request_id] += len(raw) // (4 * num_probes)
                self.num_tokens[request_id] += len(output.new_token_ids)
                end = num_prompt_tokens(request_id) + self.num_tokens[request_id]
                if output.new_token_ids and end > self.num_scores[request_id]:
                    self.violations.append(f"{request_id}: token {end - 1} left without its score")
                if output.new_logprobs is not None and not output.new_token_ids:
                    self.violations.append(f"{request_id}: logprobs left without a token")


@contextmanager
def recording(scheduler: Any, num_prompt_tokens: int) -> Iterator[Recorder]:
    recorder = Recorder()
    update = scheduler.update_from_output

    def recorded(*args: Any) -> Any:
        outputs = update(*args)
        recorder.see(outputs, lambda _request_id: num_prompt_tokens)
        return outputs

    scheduler.update_from_output = recorded
    try:
        yield recorder
    finally:
        del scheduler.update_from_output


@contextmanager
def thresholds(scheduler: Any, *values: float, mode: Mode = "enforce") -> Iterator[None]:
    """The live guard judges new requests by these thresholds."""
    guard = scheduler._circuit_breakers
    policy = guard.policy
    probes = tuple(
        p.model_copy(update={"threshold_logit": v})
        for p, v in zip(policy.probes, values, strict=True)
    )
    guard.policy = dataclasses.replace(policy, probes=probes, mode=mode)
    try:
        yield
    finally:
        guard.policy = policy


def run(llm: Any, prompt: list[int], num_requests: int = 1, **params: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "detokenize": True} | params
    )
    requests = [{"prompt_token_ids": prompt}] * num_requests
    return list(llm.generate(requests, sampling, use_tqdm=False))


def greedy(llm: Any, prompt: list[int], **params: Any) -> tuple[list[int], np.ndarray]:
    """Tokens of the greedy completion and logits (T, P) of prompt and completion."""
    (output,) = run(llm, prompt, **params)
    completion = output.outputs[0]
    return list(completion.token_ids), completion.guard.logit_TP.copy()
