"""Engine-core side: every token's score meets its request, and no token leaves before its own.

One step, in `Scheduler.update_from_output`:

    worker rows -> per-request logits by position -> verdict -> vLLM's own update -> release

The score of a token exists one step after it was sampled, when it is fed back. So the output of a
step is held until the next one, and released with the scores that judged it. A stop token or a
token that would be the last of a full context is never fed back; it is withheld, so that nothing
unscored ever leaves. To score the last token of a `max_tokens` request, one more step is run.

Shapes: T tokens of one request, P probes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt

from circuit_breakers.engine.compat import check_engine_config
from circuit_breakers.engine.config import ADAPTER_NAME, EngineGuardConfig
from circuit_breakers.engine.delivery import STOP_REASON, attach_scores
from circuit_breakers.engine.worker import SCORES_ATTRIBUTE
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import Trip
from circuit_breakers.guard.policy import Policy

__all__ = ["BlockScores", "SchedulerGuard", "install"]

logger = logging.getLogger("vllm.circuit_breakers")

FloatArray = npt.NDArray[np.float32]

_GUARD_ATTRIBUTE = "_circuit_breakers"


class BlockScores:
    """Logits of full KV blocks, under the same hashes as vLLM's prefix cache.

    A hash covers all tokens up to the block's end, so its logits are those of every request that
    hits it. Holds more blocks than the KV cache can; what is evicted all the same is recomputed
    (`knows` gates the prefix-cache hit).
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        self.block_size = block_size
        self._capacity = capacity
        self._logit_TP: OrderedDict[Any, FloatArray] = OrderedDict()

    def put(self, block_hash: Any, logit_TP: FloatArray) -> None:
        self._logit_TP[block_hash] = logit_TP.copy()
        self._logit_TP.move_to_end(block_hash)
        while len(self._logit_TP) > self._capacity:
            self._logit_TP.popitem(last=False)

    def knows(self, block_hashes: Any, num_tokens: int) -> bool:
        """Whether every block of the first `num_tokens` tokens has its scores."""
        num_blocks = -(-num_tokens // self.block_size)
        if num_blocks > len(block_hashes):
            return False
        # get() marks them as used, so that no block published before they are read evicts them.
        return all(self.get(block_hashes[i]) is not None for i in range(num_blocks))

    def get(self, block_hash: Any) -> FloatArray | None:
        logit_TP = self._logit_TP.get(block_hash)
        if logit_TP is not None:
            self._logit_TP.move_to_end(block_hash)
        return logit_TP

    def clear(self) -> None:
        self._logit_TP.clear()

    def __len__(self) -> int:
        return len(self._logit_TP)


class _Stream:
    """Scores, verdict and held output of one running request."""

    __slots__ = (
        "breaker",
        "cached_end",
        "held",
        "held_end",
        "logit_TP",
        "num_published",
        "num_rows",
        "num_sent",
    )

    def __init__(self, policy: Policy, num_prompt_tokens: int, num_probes: int) -> None:
        self.breaker = StreamBreaker(policy, num_prompt_tokens)
        self.logit_TP = np.full((num_prompt_tokens + 64, num_probes), np.nan, np.float32)
        self.num_rows = 0
        """Positions fed so far; moves back when a preempted request starts over."""
        self.cached_end = 0
        """Leading positions that came out of the prefix cache and are still to be filled in."""
        self.num_published = 0
        """Leading full blocks already in the block store."""
        self.num_sent = 0
        """Scores delivered so far."""
        self.held: Any = None
        """EngineCoreOutput whose last token has no score yet."""
        self.held_end = 0
        """Positions that must be scored before `held` may leave."""

    def write(self, rows_TP: FloatArray) -> None:
        """Takes in the logits of the next positions. Judged positions keep theirs."""
        end = self.num_rows + len(rows_TP)
        if end > len(self.logit_TP):
            grown = np.full(
                (max(end, 2 * len(self.logit_TP)), rows_TP.shape[1]), np.nan, np.float32
            )
            grown[: len(self.logit_TP)] = self.logit_TP
            self.logit_TP = grown
        first = max(self.num_rows, self.breaker.num_seen)
        if first < end:
            self.logit_TP[first:end] = rows_TP[first - self.num_rows :]
        self.num_rows = end

    def judge(self) -> Trip | None:
        """Verdict on the positions that no earlier step has judged."""
        return self.breaker.update(self.logit_TP[self.breaker.num_seen : self.num_rows])


class SchedulerGuard:
    """State of the guard in one scheduler."""

    def __init__(self, config: EngineGuardConfig, scheduler: Any) -> None:
        breaker = config.load_breaker()
        self._policy = Policy.from_manifest(breaker.manifest, config.mode)
        self._num_probes = len(self._policy.probes)
        self._dynamic_adapter = config.adapter == "dynamic"
        self._streams: dict[str, _Stream] = {}
        block_size: int = scheduler.hash_block_size
        blocks_per_kv_block = max(1, scheduler.block_size // block_size)
        self.block_scores = BlockScores(
            block_size, 2 * scheduler.kv_cache_config.num_blocks * blocks_per_kv_block
        )

    def judge_step(
        self, scheduler: Any, scheduler_output: Any, runner_output: Any
    ) -> dict[str, Trip]:
        """Takes the step's rows in and says which requests must stop, by request id."""
        logit_NP = getattr(runner_output, SCORES_ATTRIBUTE, None)
        starts = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        active: list[tuple[_Stream, Any]] = []
        offset = 0
        # Rows first, for all requests: two equal prompts in one step share blocks.
        for req_id in runner_output.req_ids:
            num_tokens = scheduler_output.num_scheduled_tokens[req_id]
            begin, offset = offset, offset + num_tokens
            request = scheduler.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            stream = self._stream(request)
            if (start := starts[req_id]) != stream.num_rows:
                # A prefix-cache hit, or a preempted request that starts over.
                stream.num_rows = stream.cached_end = start
                stream.num_published = start // self.block_scores.block_size
            stream.write(self._rows(logit_NP, begin, num_tokens, request))
            self._publish(stream, request)
            active.append((stream, request))
        trips: dict[str, Trip] = {}
        for stream, request in active:
            self._fill_cached(stream, request)
            trip = stream.judge()
            # A token without a score stops the request in every mode: that is a fault, not a trip.
            if trip is not None and (self._policy.mode == "enforce" or np.isnan(trip.score)):
                trips[request.request_id] = trip
        return trips

    def release(self, scheduler: Any, outputs: dict[int, Any]) -> None:
        """Swaps each step output for the held one before it, with the scores that judged it."""
        for engine_outputs in outputs.values():
            released: list[Any] = []
            for output in engine_outputs.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    # Finished without having run (a grammar error, say): there is nothing to hold.
                    _blank(output)
                    released.append(output)
                    continue
                if stream.held is not None and stream.num_rows >= stream.held_end:
                    released.append(self._send(stream, stream.held))
                    stream.held = None
                if output.finish_reason is None:
                    assert stream.held is None, "a request is never two outputs ahead of its scores"
                    stream.held = output
                    stream.held_end = scheduler.requests[output.request_id].num_tokens
                else:
                    # The token of this step will never be fed back, so it has no score.
                    _blank(output)
                    released.append(self._send(stream, output))
                    del self._streams[output.request_id]
            engine_outputs.outputs = released

    def stop(self, request: Any, trip: Trip, output_class: Any) -> Any:
        """The last output of a tripped request; what was held is dropped."""
        stream = self._streams.pop(request.request_id)
        held = stream.held
        events = [*((held.events or ()) if held else ()), *(request.take_events() or ())]
        output = output_class(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=STOP_REASON,
            events=events or None,
            prefill_stats=held.prefill_stats if held else request.take_prefill_stats(),
            trace_headers=request.trace_headers,
        )
        return self._send(stream, output, trip)

    def forget(self, request_ids: Any) -> None:
        """Drops what is held for requests that ended elsewhere."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    def _stream(self, request: Any) -> _Stream:
        stream = self._streams.get(request.request_id)
        if stream is None:
            stream = _Stream(self._policy, request.num_prompt_tokens, self._num_probes)
            self._streams[request.request_id] = stream
        return stream

    def _rows(
        self, logit_NP: FloatArray | None, begin: int, num_tokens: int, request: Any
    ) -> FloatArray:
        adapter = request.lora_request.lora_name if request.lora_request else None
        wrong_adapter = self._dynamic_adapter and adapter != ADAPTER_NAME
        if logit_NP is None or wrong_adapter or begin + num_tokens > len(logit_NP):
            return np.full((num_tokens, self._num_probes), np.nan, np.float32)
        return logit_NP[begin : begin + num_tokens]

    def _publish(self, stream: _Stream, request: Any) -> None:
        size = self.block_scores.block_size
        hashes = request.block_hashes
        while (end := (stream.num_published + 1) * size) <= stream.num_rows:
            if stream.num_published >= len(hashes):
                break
            logit_TP = stream.logit_TP[end - size : end]
            if np.isfinite(logit_TP).all():
                self.block_scores.put(hashes[stream.num_published], logit_TP)
            stream.num_published += 1

    def _fill_cached(self, stream: _Stream, request: Any) -> None:
        """Copies the logits of prefix-cached positions; unknown ones stay NaN and trip."""
        size, end = self.block_scores.block_size, stream.cached_end
        for start in range(stream.breaker.num_seen // size * size, end, size):
            index = start // size
            logit_TP = (
                self.block_scores.get(request.block_hashes[index])
                if index < len(request.block_hashes)
                else None
            )
            if logit_TP is not None:
                stop = min(start + size, end)
                stream.logit_TP[start:stop] = logit_TP[: stop - start]
        stream.cached_end = 0

    def _send(self, stream: _Stream, output: Any, trip: Trip | None = None) -> Any:
        # After a preemption the rows restart below what is judged; the judged scores stand.
        end = stream.breaker.num_seen
        attach_scores(output, stream.num_sent, stream.logit_TP[stream.num_sent : end], trip)
        stream.num_sent = end
        return output


def _blank(output: Any) -> None:
    """Takes every trace of unscored tokens out of an output."""
    output.new_token_ids = []
    output.stop_reason = None  # a stop token's id, or what it repeats
    output.new_logprobs = None
    output.new_sampling_mask = None
    output.routed_experts = None


def install() -> None:
    """Wraps vLLM's scheduler. Without a breaker the wraps only call through."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    scheduler_init = Scheduler.__init__
    add_request = Scheduler.add_request
    update_from_output = Scheduler.update_from_output
    finish_requests = Scheduler.finish_requests

    @wraps(scheduler_init)
    def guarded_init(self: Any, *args: Any, **kwargs: Any) -> None:
        scheduler_init(self, *args, **kwargs)
        config = EngineGuardConfig.from_vllm_config(self.vllm_config)
        guard = None
        if config is not None:
            check_engine_config(self.vllm_config)
            guard = SchedulerGuard(config, self)
            _gate_prefix_cache(self.kv_cache_manager, guard.block_scores)
        setattr(self, _GUARD_ATTRIBUTE, guard)

    @wraps(add_request)
    def guarded_add_request(self: Any, request: Any) -> None:
        if getattr(self, _GUARD_ATTRIBUTE) is not None:
            # One step more, so that the last token is fed back and scored.
            request.max_tokens += 1
        add_request(self, request)

    @wraps(finish_requests)
    def guarded_finish_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = finish_requests(self, *args, **kwargs)
        guard: SchedulerGuard | None = getattr(self, _GUARD_ATTRIBUTE)
        if guard is not None:
            guard.forget(r.request_id for r in finished)
        return finished

    @wraps(update_from_output)
    def guarded_update(self: Any, scheduler_output: Any, runner_output: Any) -> Any:
        guard: SchedulerGuard | None = getattr(self, _GUARD_ATTRIBUTE)
        if guard is None or not scheduler_output.num_scheduled_tokens:
            return update_from_output(self, scheduler_output, runner_output)
        trips = guard.judge_step(self, scheduler_output, runner_output)
        for req_id in trips:
            _blank_runner_output(runner_output, req_id)
        outputs = update_from_output(self, scheduler_output, runner_output)
        guard.release(self, outputs)
        for req_id, trip in trips.items():
            for request in finish_requests(self, req_id, RequestStatus.FINISHED_STOPPED):
                client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
                client.outputs.append(guard.stop(request, trip, EngineCoreOutput))
        return outputs

    Scheduler.__init__ = guarded_init
    Scheduler.add_request = guarded_add_request
    Scheduler.finish_requests = guarded_finish_requests
    Scheduler.update_from_output = guarded_update


def _blank_runner_output(runner_output: Any, req_id: str) -> None:
    """The token sampled in the tripping step never reaches the request."""
    if runner_output.sampled_token_ids:
        runner_output.sampled_token_ids[runner_output.req_id_to_index[req_id]] = []
    runner_output.prompt_logprobs_dict.pop(req_id, None)
    runner_output.prompt_token_id_logprobs_dict.pop(req_id, None)


def _gate_prefix_cache(manager: Any, block_scores: BlockScores) -> None:
    """A prefix-cache hit counts only where the scores of its tokens are known."""
    get_computed_blocks = manager.get_computed_blocks

    @wraps(get_computed_blocks)
    def gated(request: Any) -> Any:
        hit = get_computed_blocks(request)
        if block_scores.knows(request.block_hashes, hit[1]):
            return hit
        logger.info("prefix-cache hit without scores: %d tokens are computed again", hit[1])
        return (manager.empty_kv_cache_blocks, 0, 0)

    manager.get_computed_blocks = gated
