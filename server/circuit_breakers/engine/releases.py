"""What may leave of an EngineCoreOutput: tokens before a position, with the scores of them."""

from __future__ import annotations

from typing import Any

from circuit_breakers.engine.delivery import STOP_REASON, attach_scores
from circuit_breakers.engine.stream import RequestStream
from circuit_breakers.guard.decision import Trip

__all__ = ["OF_FIRST_OUTPUT", "keep_tokens", "send_last", "send_scored"]

OF_FIRST_OUTPUT = ("new_prompt_logprobs_tensors", "prefill_stats", "prompt_token_id_logprobs")
"""Fields of an EngineCoreOutput that say something of the prompt."""


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


def send_last(stream: RequestStream, output: Any, trip: Trip | None = None) -> list[Any]:
    """The last outputs of a request: its tokens that were judged and did not trip, then its end."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    request = stream.request
    num_new = len(output.new_token_ids)
    start = request.num_tokens - num_new
    # max_tokens is one more than the client's, so that the last token is judged.
    client_end = request.num_prompt_tokens + request.max_tokens - 1
    token_end = min(stream.num_judged if trip is None else trip.token_index, client_end)
    keep_tokens(output, max(token_end - start, 0))
    token_end = start + len(output.new_token_ids)
    if trip is not None:
        score_end = stream.num_judged
        output.finish_reason, output.stop_reason = FinishReason.STOP, STOP_REASON
    else:
        score_end = min(stream.num_judged, token_end)
        if output.finish_reason == FinishReason.STOP and request.num_tokens > client_end:
            # Nothing that comes after the client's last token ends its request.
            output.finish_reason = FinishReason.LENGTH
    if output.finish_reason != FinishReason.STOP or not 0 < len(output.new_token_ids) < num_new:
        return [send_scored(stream, output, score_end, trip)]
    # vLLM takes the last token of a stopped output for its stop token, which has gone.
    end = EngineCoreOutput(
        request_id=output.request_id,
        new_token_ids=[],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        spec_decode_metrics=output.spec_decode_metrics,
    )
    output.finish_reason = output.stop_reason = output.spec_decode_metrics = None
    return [
        send_scored(stream, output, token_end),
        send_scored(stream, end, score_end, trip),
    ]
