"""Nothing leaves before its score: hundreds of sampled streams, recorded by a real HTTP client.

The client trusts nothing that the guard says. It takes the tokens, logprobs and text of each stream
and asks transformers whether any token of it should never have been sent. The likelihood of the
word that trips is raised, so that trips come at random points.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from circuit_breakers.models import ResolvedModel

from .breaker_for_words import PARIS
from .conftest import MODEL, Server
from .oracle import MARGIN, word_oracle

NUM_REQUESTS = 240
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


def test_no_client_gets_a_token_that_trips_or_anything_behind_it(
    server: Server, smollm2: ResolvedModel, word_breaker: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path, local_files_only=True)
    (paris_id,) = tokenizer(PARIS.word).input_ids
    oracle = word_oracle(smollm2, word_breaker)
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
