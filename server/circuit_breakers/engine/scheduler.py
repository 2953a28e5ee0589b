"""Engine-core side: every token's score meets its request, and no token leaves before its own.

One step, around `Scheduler.update_from_output`:

    worker rows -> logits by position -> vLLM's own update -> verdict -> release

The score of a token exists one step after it was sampled, when it is fed back. So the output of a
step is held until the next one, and released with the scores that judged it. A stop token or a
token that would be the last of a full context is never fed back; it is withheld, so that nothing
unscored ever leaves. To score the last token of a `max_tokens` request, one more step is run.

Async scheduling changes nothing here: a step's rows and a step's tokens arrive together, however
many steps are under way. With speculative decoding, drafts are scored in the step that accepts
them; rows of rejected ones are dropped.

Shapes: N rows of the flattened batch, T tokens of one request, P probes.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt

from circuit_breakers.engine.block_scores import BlockScores, gate_prefix_cache
from circuit_breakers.engine.compat import check_engine_config, check_scheduler
from circuit_breakers.engine.config import ADAPTER_NAME, EngineGuardConfig
from circuit_breakers.engine.releases import (
    OF_FIRST_OUTPUT,
    keep_tokens,
    send_last,
    send_scored,
)
from circuit_breakers.engine.running_streams import RunningStreams
from circuit_breakers.engine.score_rows import nan_rows
from circuit_breakers.engine.stream import RequestStream
from circuit_breakers.engine.worker import SCORES_ATTRIBUTE
from circuit_breakers.guard.decision import Trip
from circuit_breakers.guard.policy import Policy

__all__ = ["SchedulerGuard", "install"]

logger = logging.getLogger("vllm.circuit_breakers")

FloatArray = npt.NDArray[np.float32]

_GUARD_ATTRIBUTE = "_circuit_breakers"


class SchedulerGuard:
    """State of the guard in one scheduler."""

    def __init__(self, config: EngineGuardConfig, scheduler: Any) -> None:
        breaker = config.load_breaker()
        self.policy = Policy.from_manifest(breaker.manifest, config.mode, config.target_fpr)
        """What a request is judged by that brings no policy of its own."""
        self._dynamic_adapter = config.adapter == "dynamic"
        self._streams = RunningStreams()
        block_size: int = scheduler.hash_block_size
        blocks_per_kv_block = max(1, scheduler.block_size // block_size)
        self.block_scores = BlockScores(
            block_size, 2 * scheduler.kv_cache_config.num_blocks * blocks_per_kv_block
        )

    @property
    def num_streams(self) -> int:
        """Requests that have run and not ended."""
        return len(self._streams)

    def take_rows(
        self, scheduler: Any, scheduler_output: Any, runner_output: Any
    ) -> list[RequestStream]:
        """Takes the step's rows in, before vLLM updates its requests; the streams that ran."""
        logit_NP = self._rows(scheduler_output, runner_output)
        # Nearly always harmless: then no running request's part has to be looked at.
        screen = self._streams.screen
        may_trip_N = (
            None if screen is None or screen.is_harmless(logit_NP) else screen.may_trip(logit_NP)
        )
        # Where a running request stands is known; only these have moved.
        starts = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        if cached.resumed_req_ids:
            pairs = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            starts.update((i, start) for i, start in pairs if i in cached.resumed_req_ids)
        raw, row_bytes = logit_NP.tobytes(), logit_NP.shape[1] * logit_NP.itemsize
        block_scores = self.block_scores
        scheduled_drafts = scheduler_output.scheduled_spec_decode_tokens
        streams: list[RequestStream] = []
        end = 0
        for i, req_id in enumerate(runner_output.req_ids):
            num_tokens = scheduler_output.num_scheduled_tokens[req_id]
            begin, end = end, end + num_tokens
            request = scheduler.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            if request.num_stale_output_tokens > 0 and request.drop_stale_output:
                # vLLM drops this step's tokens, and with them what the rows belong to.
                continue
            if (drafts := scheduled_drafts.get(req_id)) is not None:
                num_accepted = max(len(runner_output.sampled_token_ids[i]) - 1, 0)
                num_tokens -= len(drafts) - num_accepted
            stream = self._streams.get(req_id)
            is_new = stream is None
            if stream is None:
                stream = self._streams.open(request, self.policy)
            if (start := starts.get(req_id)) is not None:
                stream.restart(start, block_scores)
            rows = raw[begin * row_bytes : (begin + num_tokens) * row_bytes]
            # The screen above did not know of a new one's policy.
            may_trip = is_new or (
                may_trip_N is not None and bool(may_trip_N[begin : begin + num_tokens].any())
            )
            if self._dynamic_adapter and not _runs_breaker_adapter(request):
                rows, may_trip = nan_rows(num_tokens, logit_NP.shape[1]), True
            stream.write(rows, may_trip)
            stream.publish(block_scores)
            streams.append(stream)
        return streams

    def judge(self, streams: list[RequestStream]) -> dict[str, Trip]:
        """Which requests must stop, by request id; after vLLM's update."""
        trips: dict[str, Trip] = {}
        for stream in streams:
            stream.trim(stream.request.num_tokens)
            trip = stream.judge()
            # A token without a score stops the request in every mode: that is a fault, not a trip.
            if trip is not None and (stream.policy.mode == "enforce" or np.isnan(trip.score)):
                trips[stream.request.request_id] = trip
        return trips

    def release(self, outputs: list[Any], trips: dict[str, Trip]) -> list[Any]:
        """What may leave of a step's outputs: the held ones of the step before, and last ones.

        Args:
            trips: by request id; those of requests with an output in this step are taken out.
        """
        released: list[Any] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                # Finished without having run (a grammar error, say): there is nothing to hold.
                keep_tokens(output, 0)
                released.append(output)
                continue
            trip = trips.pop(output.request_id, None)
            if trip is not None:
                released += self.stop(stream, trip, output)
                continue
            if stream.held is not None and stream.num_judged >= stream.held_end:
                # Accepted drafts may be judged beyond it, and be trimmed by this very output.
                released.append(send_scored(stream, stream.held, stream.held_end))
                stream.held = None
            if output.finish_reason is None:
                assert stream.held is None, "a request is never two outputs ahead of its scores"
                stream.held = output
                stream.held_end = stream.request.num_tokens
            else:
                released += send_last(stream, output)
                self._streams.close(output.request_id)
        return released

    def stop(self, stream: RequestStream, trip: Trip, output: Any) -> list[Any]:
        """The last outputs of a tripped request, with the tokens before the trip.

        Args:
            output: of this step; a blank one for a request that had none.
        """
        self._streams.close(stream.request.request_id)
        released = []
        held = stream.held
        if held is not None:
            held_start = stream.held_end - len(held.new_token_ids)
            keep_tokens(held, max(trip.token_index - held_start, 0))
            if held.new_token_ids:
                # Ends before this step's own positions, or all of it is before the trip.
                end = held_start + len(held.new_token_ids)
                released.append(send_scored(stream, held, end))
            else:
                for name in OF_FIRST_OUTPUT:
                    setattr(output, name, getattr(held, name))
                output.events = [*(held.events or ()), *(output.events or ())] or None
        if trip.phase == "prompt":
            output.new_prompt_logprobs_tensors = output.prompt_token_id_logprobs = None
        return released + send_last(stream, output, trip)

    def stream_of(self, request_id: str) -> RequestStream:
        return self._streams[request_id]

    def forget(self, request_ids: Any) -> None:
        """Drops what is held for requests that ended elsewhere."""
        for request_id in request_ids:
            if request_id in self._streams:
                self._streams.close(request_id)

    def _rows(self, scheduler_output: Any, runner_output: Any) -> FloatArray:
        """The worker's rows (N, P); all NaN when they are missing or of another shape."""
        logit_NP: FloatArray | None = getattr(runner_output, SCORES_ATTRIBUTE, None)
        expected = (scheduler_output.total_num_scheduled_tokens, len(self.policy.probes))
        if logit_NP is None or logit_NP.shape != expected:
            got = None if logit_NP is None else logit_NP.shape
            logger.error("scores of a step are missing: got %s, expected %s", got, expected)
            return np.full(expected, np.nan, np.float32)
        return logit_NP


def _runs_breaker_adapter(request: Any) -> bool:
    return request.lora_request is not None and request.lora_request.lora_name == ADAPTER_NAME


def _guarded_update(guard: SchedulerGuard, scheduler: Any, original: Any, step: Any) -> Any:
    streams = guard.take_rows(scheduler, *step)
    outputs = original.update(scheduler, *step)
    trips = guard.judge(streams)
    tripped = [guard.stream_of(req_id) for req_id in trips]
    for engine_outputs in outputs.values():
        engine_outputs.outputs = guard.release(engine_outputs.outputs, trips)
    for stream in tripped:
        _finish(guard, scheduler, original, stream, trips, outputs)
    return outputs


def _finish(
    guard: SchedulerGuard,
    scheduler: Any,
    original: Any,
    stream: RequestStream,
    trips: dict[str, Trip],
    outputs: dict[int, Any],
) -> None:
    """Ends a tripped request in vLLM; `trips` has those that had no output in this step."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    request = stream.request
    if not request.is_finished():
        original.finish(scheduler, request.request_id, RequestStatus.FINISHED_STOPPED)
    trip = trips.get(request.request_id)
    if trip is None:
        return
    # In the middle of its prompt: vLLM has no output for it.
    blank = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        events=request.take_events(),
        prefill_stats=request.take_prefill_stats(),
        trace_headers=request.trace_headers,
    )
    client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
    client.outputs += guard.stop(stream, trip, blank)


class _Original:
    """vLLM's own methods of the scheduler."""

    def __init__(self, scheduler_class: Any) -> None:
        self.init = scheduler_class.__init__
        self.add = scheduler_class.add_request
        self.finish = scheduler_class.finish_requests
        self.update = scheduler_class.update_from_output
        self.reset_prefix_cache = scheduler_class.reset_prefix_cache


def install() -> None:
    """Wraps vLLM's scheduler. Without a breaker the wraps only call through."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = _Original(Scheduler)

    @wraps(original.init)
    def guarded_init(self: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _GUARD_ATTRIBUTE, None)
        original.init(self, *args, **kwargs)
        config = EngineGuardConfig.from_vllm_config(self.vllm_config)
        if config is None:
            return
        check_engine_config(self.vllm_config)
        check_scheduler(self)
        guard = SchedulerGuard(config, self)
        gate_prefix_cache(self.kv_cache_manager, guard.block_scores)
        setattr(self, _GUARD_ATTRIBUTE, guard)

    @wraps(original.add)
    def guarded_add_request(self: Any, request: Any) -> None:
        if getattr(self, _GUARD_ATTRIBUTE) is not None:
            # One step more, so that the last token is fed back and scored.
            request.max_tokens += 1
        original.add(self, request)

    @wraps(original.finish)
    def guarded_finish_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = original.finish(self, *args, **kwargs)
        guard: SchedulerGuard | None = getattr(self, _GUARD_ATTRIBUTE)
        if guard is not None:
            guard.forget(r.request_id for r in finished)
        return finished

    @wraps(original.reset_prefix_cache)
    def guarded_reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard: SchedulerGuard | None = getattr(self, _GUARD_ATTRIBUTE)
        if guard is not None:
            # It is reset when weights change, and scores of other weights are no scores.
            guard.block_scores.clear()
        return original.reset_prefix_cache(self, *args, **kwargs)

    @wraps(original.update)
    def guarded_update(self: Any, scheduler_output: Any, runner_output: Any) -> Any:
        guard: SchedulerGuard | None = getattr(self, _GUARD_ATTRIBUTE)
        if guard is None or not scheduler_output.num_scheduled_tokens:
            return original.update(self, scheduler_output, runner_output)
        return _guarded_update(guard, self, original, (scheduler_output, runner_output))

    Scheduler.__init__ = guarded_init
    Scheduler.add_request = guarded_add_request
    Scheduler.finish_requests = guarded_finish_requests
    Scheduler.reset_prefix_cache = guarded_reset_prefix_cache
    Scheduler.update_from_output = guarded_update
