"""One block of a benchmark: a batch of requests through a live in-process engine, step by step.

Requests are streamed, as a server would: an output counts when `LLMEngine.step` hands it over.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from circuit_breakers.errors import ConfigError, NotReadyError

__all__ = ["WORKLOADS", "BenchEngine", "Block", "Step", "Workload", "parse_workload"]

_LOWEST_TOKEN = 16
"""Control tokens of most vocabularies lie below."""


@dataclass(frozen=True)
class Workload:
    """Lengths of every request, in tokens."""

    name: str
    prompt_tokens: int
    output_tokens: int


WORKLOADS = {
    "decode": Workload("decode", 32, 256),
    "prompt": Workload("prompt", 512, 16),
}


def parse_workload(text: str) -> Workload:
    """A workload by its name, or by its lengths as PROMPT:OUTPUT.

    Raises:
        ConfigError: it is neither.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    prompt, _, output = text.partition(":")
    if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
        raise ConfigError(
            f"got workload {text!r}, expected {', '.join(WORKLOADS)} or PROMPT:OUTPUT in tokens, "
            "such as 32:256"
        )
    return Workload(text, int(prompt), int(output))


class Step(NamedTuple):
    """One engine step, from schedule to delivered outputs."""

    time_s: float
    num_tokens: int
    """Tokens fed to the model."""
    num_requests: int
    prefill: bool
    """Some of the tokens are a prompt's."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block took."""

    elapsed_s: float
    """From before the first request is added until the last token is delivered."""
    num_tokens: int
    """Output tokens delivered."""
    num_scored: int | None
    """Scores that came with them, prompts included; None when no request had any."""
    steps: list[Step]
    ttft_s: list[float]
    """A value a request: from adding it to its first delivered token."""
    itl_s: list[float]
    """Gaps between delivered tokens; tokens that come together count 0 for all but the first."""
    token_ids: list[list[int]]
    """Delivered output, by request."""
    params: list[Any]
    """What vLLM says of each request's KV transfer."""


class BenchEngine:
    """An in-process engine that runs blocks."""

    def __init__(self, llm: Any, vocab_size: int) -> None:
        self.llm = llm
        self._vocab_size = vocab_size
        self._num_prompts = 0
        self._shapes: list[tuple[int, int, bool]] = []
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = self.scheduler.schedule

        def recorded_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            num_tokens, num_requests = (
                output.total_num_scheduled_tokens,
                len(output.num_scheduled_tokens),
            )
            prefill = bool(output.scheduled_new_reqs) or num_tokens > num_requests
            self._shapes.append((num_tokens, num_requests, prefill))
            return output

        # In every arm alike; an append a step.
        self.scheduler.schedule = recorded_schedule

    def close(self) -> None:
        """Shuts the engine down and gives its memory back."""
        del self.scheduler.schedule
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.scheduler
        gc.collect()

    def prompts(self, batch: int, num_tokens: int) -> list[list[int]]:
        """Random prompts, none seen before: the prefix cache is on and never hits."""
        rng = np.random.default_rng((self._num_prompts, num_tokens))
        self._num_prompts += 1
        low = min(_LOWEST_TOKEN, self._vocab_size // 2)
        prompts: list[list[int]] = rng.integers(low, self._vocab_size, (batch, num_tokens)).tolist()
        return prompts

    def run(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        lora_request: Any = None,
        extra_args: dict[str, Any] | None = None,
    ) -> Block:
        """Runs all prompts at once, greedily, each to exactly `output_tokens` tokens.

        Raises:
            NotReadyError: the engine delivered another number of tokens.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args,
        )
        engine = self.llm.llm_engine
        names = [str(i) for i in range(len(prompts))]
        last_s: dict[str, float] = {}
        token_ids: dict[str, list[int]] = {name: [] for name in names}
        params: dict[str, Any] = {}
        ttft_s: list[float] = []
        itl_s: list[float] = []
        times_s: list[float] = []
        num_scored: int | None = None
        gc.collect()
        self._shapes.clear()
        now_s = started_s = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            last_s[name] = time.perf_counter()
            engine.add_request(
                name, {"prompt_token_ids": prompt}, sampling, lora_request=lora_request
            )
        while engine.has_unfinished_requests():
            began_s = time.perf_counter()
            outputs = engine.step()
            now_s = time.perf_counter()
            times_s.append(now_s - began_s)
            for output in outputs:
                name, completion = output.request_id, output.outputs[0]
                new = completion.token_ids
                if new:
                    gaps_s = itl_s if token_ids[name] else ttft_s
                    gaps_s.append(now_s - last_s[name])
                    itl_s.extend([0.0] * (len(new) - 1))
                    last_s[name] = now_s
                    token_ids[name].extend(new)
                if output.finished:
                    params[name] = output.kv_transfer_params
                    scores = getattr(completion, "guard", None)
                    if scores is not None:
                        num_scored = (num_scored or 0) + scores.num_tokens
        delivered = [token_ids[name] for name in names]
        if any(len(ids) != output_tokens for ids in delivered):
            counts = sorted({len(ids) for ids in delivered})
            raise NotReadyError(
                f"requests ended with {counts} tokens, expected {output_tokens} each; "
                "the arms would not do the same work"
            )
        steps = [Step(t, *shape) for t, shape in zip(times_s, self._shapes, strict=True)]
        return Block(
            elapsed_s=now_s - started_s,
            num_tokens=sum(map(len, delivered)),
            num_scored=num_scored,
            steps=steps,
            ttft_s=ttft_s,
            itl_s=itl_s,
            token_ids=delivered,
            params=[params.get(name) for name in names],
        )
