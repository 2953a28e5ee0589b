"""Nothing leaves before its score: hundreds of sampled streams, recorded by a real HTTP client.

The client trusts nothing that the guard says. It takes the tokens, logprobs and text of each stream
and asks transformers whether any token of it should never have been sent. The likelihood of the
word that trips is raised, so that trips come at random points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact import load_breaker
from circuit_breakers.models import ResolvedModel

from .breaker_for_words import PARIS
from .conftest import MODEL, Server

NUM_REQUESTS = 240
MARGIN = 1.5
"""bfloat16 in other batches moves a logit by up to 0.5; the word is at 5 and more, others at -5."""
PROMPTS = (
    "My favourite city in the world is",
    "Last summer we travelled from Rome to",
    "The museum that I liked best is in",
    "A short list of cities: Berlin, Madrid,",
)


@dataclass
class Recording:
    """One choice as it came over the wire."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    text: str = ""
    finish_reason: str | None = None


def record(server: Server, prompt_ids: list[int], paris_id: int, i: int) -> list[Recording]:
    num_choices = 1 + i % 2
    recordings = [Recording(prompt_ids) for _ in range(num_choices)]
    stream = server.openai.completions.create(
        model=MODEL,
        prompt=prompt_ids,
        n=num_choices,
        temperature=1.0,
        max_tokens=1 + i % 24,
        logprobs=1,
        # Kept back by vLLM while it could be the start of a stop string.
        stop=[", and then", " the end"] if i % 3 == 0 else None,
        logit_bias={str(paris_id): 3.0},
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            recording = recordings[choice.index]
            assert recording.finish_reason is None, "nothing comes after the end"
            recording.token_ids += (choice.model_extra or {}).get("token_ids") or []
            recording.num_logprobs += len(choice.logprobs.tokens or []) if choice.logprobs else 0
            recording.text += choice.text
            recording.finish_reason = choice.finish_reason
    return recordings


@pytest.fixture(scope="module")
def oracle(smollm2: ResolvedModel, server: Server, word_breaker: Any) -> Iterator[Any]:
    """Largest probe logit of each token; the word breaker's adapter is one of zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    breaker = load_breaker(word_breaker)
    lm = AutoModelForCausalLM.from_pretrained(
        smollm2.path, dtype=torch.float32, local_files_only=True
    ).eval()

    def peaks(token_ids: list[int]) -> Any:
        with torch.no_grad():
            hidden = lm.base_model(torch.tensor([token_ids]), output_hidden_states=True)
        columns = []
        for spec in breaker.manifest.probes:
            weight_D, bias = breaker.weights[spec.name]
            columns.append(hidden.hidden_states[spec.layer + 1][0].numpy() @ weight_D + bias)
        return np.stack(columns, axis=1).max(axis=1)

    yield peaks


def test_no_client_gets_a_token_that_trips_or_anything_behind_it(
    server: Server, smollm2: ResolvedModel, oracle: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path, local_files_only=True)
    (paris_id,) = tokenizer(PARIS.word).input_ids
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(record, server, prompts[i % len(prompts)], paris_id, i)
            for i in range(NUM_REQUESTS)
        ]
        recordings = [recording for future in futures for recording in future.result()]
    for recording in recordings:
        assert recording.finish_reason is not None
        assert recording.num_logprobs == len(recording.token_ids), "a logprob is a token"
        assert paris_id not in recording.token_ids
        # Text may lag behind its tokens (a stop string, half a character), never run ahead.
        assert tokenizer.decode(recording.token_ids).startswith(recording.text)
        first = len(recording.prompt_ids)
        peak_T = oracle([*recording.prompt_ids, *recording.token_ids])[first:]
        assert not len(peak_T) or peak_T.max() < MARGIN, "a token that should have tripped"
    reasons = Counter(recording.finish_reason for recording in recordings)
    # The test is not empty: many streams trip, many do not, and trips come at any point.
    assert min(reasons["content_filter"], reasons["length"]) > len(recordings) / 8, reasons
    trips_at = {len(r.token_ids) for r in recordings if r.finish_reason == "content_filter"}
    assert len(trips_at & set(range(10))) >= 7, trips_at
