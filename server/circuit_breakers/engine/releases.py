"""What may leave of an EngineCoreOutput: tokens before a position, with the scores of them."""

from __future__ import annotations

from typing import Any

from circuit_breakers.engine.delivery import attach_scores
from circuit_breakers.engine.stream import RequestStream
from circuit_breakers.guard.decision import Trip

__all__ = ["OF_FIRST_OUTPUT", "keep_judged", "keep_tokens", "send_scored"]

OF_FIRST_OUTPUT = ("new_prompt_logprobs_tensors", "prefill_stats", "prompt_token_id_logprobs")
"""Fields of an EngineCoreOutput that say something of the prompt."""


def keep_judged(request: Any, output: Any, end: int) -> int:
    """Trims a last output to tokens before position `end`; the position that it now ends at."""
    num_new = len(output.new_token_ids)
    start = request.num_tokens - num_new
    # max_tokens is one more than the client's, so that the last token is judged.
    client_end = request.num_prompt_tokens + request.max_tokens - 1
    keep_tokens(output, max(min(end, client_end) - start, 0))
    return start + len(output.new_token_ids)


def keep_tokens(output: Any, num_tokens: int) -> None:
    """Takes every trace of the tokens from the `num_tokens`-th on out of an output."""
    if num_tokens >= len(output.new_token_ids):
        return
    output.new_token_ids = output.new_token_ids[:num_tokens]
    output.stop_reason = None  # a stop token's id, or what it repeats
    output.new_sampling_mask = None
    output.routed_experts = None
    if output.new_logprobs is not None:
        output.new_logprobs = (
            output.new_logprobs.slice_request(0, num_tokens) if num_tokens else None
        )


def send_scored(stream: RequestStream, output: Any, end: int, trip: Trip | None = None) -> Any:
    """Attaches the scores of the positions before `end` that have not been sent."""
    end = max(end, stream.num_sent)
    attach_scores(output, stream.num_sent, stream.num_probes, stream.unsent(end), trip)
    stream.num_sent = end
    return output
