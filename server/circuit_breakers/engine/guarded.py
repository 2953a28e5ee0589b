"""GuardedEngine: vLLM's engine client with the guard in front; every route generates through it.

The engine core has already withheld unscored tokens and stopped tripped requests. This layer pins
the adapter, strips what a client could use to get around, judges the delivered scores once more
with the same state machine, and refuses to pass on a token that its own verdict does not cover.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.delivery import TokenScores
from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.errors import ConfigError, UnguardedOutputError
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.decision import GuardReport, Mode, Phase
from circuit_breakers.guard.margins import margins
from circuit_breakers.guard.policy import Policy

__all__ = ["GuardSession", "GuardedEngine", "current_session", "governed_by", "guard_session"]

_PASSED_THROUGH = frozenset(
    {
        "check_admission",
        "check_health",
        "dead_error",
        "do_log_stats",
        "errored",
        "get_supported_tasks",
        "input_processor",
        "is_running",
        "is_stopped",
        "is_tracing_enabled",
        "model_config",
        "renderer",
        "shutdown",
        "vllm_config",
    }
)
"""What vLLM's server may reach of the engine, besides generate and abort. Nothing that changes
weights, adapters or caches, and no call into the workers, one of which could switch a probe off."""


class _Stream:
    """One choice of one request, seen from the API process."""

    def __init__(self, policy: Policy, num_prompt_tokens: int) -> None:
        self.policy = policy
        self.breaker = StreamBreaker(policy, num_prompt_tokens)
        self.num_prompt_tokens = num_prompt_tokens
        self.scores: TokenScores | None = None
        """Logits delivered so far; None before the first ones."""
        self.num_delivered = 0
        """Completion tokens passed on."""
        self.stopped = False
        """The engine stopped it for a trip."""
        self.finish_reason: str | None = None
        """Why it ended; None while it runs."""


class GuardSession:
    """What the guard saw while one HTTP request was handled; a request may have many streams."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or _governing.get()
        """What every stream is judged by; None leaves it to the engine's own policy."""
        self._streams: dict[int, _Stream] = {}
        self._num_choices = 0
        self.error: Exception | None = None
        """What broke a generate() call off, for routes of vLLM's that do not hand it on."""
        self._started_s = time.monotonic()
        self.first_delivery_s: float | None = None
        """Seconds from the session's start to the first delivered token."""
        self.num_leaked = 0
        """Tokens at or past a trip that reached this layer in enforce mode; must stay 0."""
        self._num_unscored_within = 0
        self.request_ids: list[str] = []
        """vLLM's, of the generate() calls made so far."""

    def reports(self) -> list[GuardReport]:
        """One report for each choice that ran, in order of choice."""
        return [self._streams[choice].breaker.report() for choice in self.choices]

    @property
    def choices(self) -> list[int]:
        """Numbers of the choices that ran; those of `reports`."""
        return sorted(self._streams)

    def report_for(self, choice: int) -> GuardReport | None:
        """The report of choice `choice` of the response; None when it has not run.

        Several prompts of one completion request number their choices through.
        """
        stream = self._streams.get(choice)
        return None if stream is None else stream.breaker.report()

    def finish_reason_for(self, choice: int) -> str | None:
        """Why choice `choice` ended; None while it runs or when it has not run."""
        stream = self._streams.get(choice)
        return None if stream is None else stream.finish_reason

    @property
    def prompt_tripped(self) -> GuardReport | None:
        """The report of a stream whose prompt tripped and was stopped; None without one."""
        for stream in self._streams.values():
            report = stream.breaker.report()
            if stream.stopped and report.phase == "prompt":
                return report
        return None

    @property
    def stopped(self) -> GuardReport | None:
        """The report of the first stream that a trip ended; None without one."""
        for choice in sorted(self._streams):
            if self._streams[choice].stopped:
                return self._streams[choice].breaker.report()
        return None

    def judged_choices(self) -> set[int]:
        """Choices whose prompt has its verdict: all of it was judged, or it was stopped within."""
        return {
            choice
            for choice, stream in self._streams.items()
            if stream.stopped or stream.breaker.num_seen >= stream.num_prompt_tokens
        }

    def margins_for(self, choice: int, phase: Phase) -> dict[str, float] | None:
        """By probe, how far a choice's highest score of a phase lies above its threshold.

        None when the choice has not run, or when a token of it came back without a score.
        """
        stream = self._streams.get(choice)
        if stream is None or stream.scores is None or stream.breaker.num_unscored:
            return None
        logit_TP = stream.scores.logit_TP
        return margins(stream.policy, logit_TP, stream.num_prompt_tokens, phase)

    @property
    def num_stopped_prompt_tokens(self) -> int:
        """Prompt tokens of the streams that were stopped on their prompt, and deliver nothing."""
        return sum(
            stream.num_prompt_tokens
            for stream in self._streams.values()
            if stream.stopped and stream.breaker.report().phase == "prompt"
        )

    @property
    def max_scores(self) -> dict[Phase, float]:
        """Highest running score by phase, over all streams; a phase without scores is absent."""
        peaks: dict[Phase, float] = {}
        for stream in self._streams.values():
            for phase, peak in stream.breaker.phase_peaks.items():
                peaks[phase] = max(peak, peaks.get(phase, peak))
        return peaks

    @property
    def probe_peaks(self) -> dict[str, dict[str, float]]:
        """Highest running score by phase and probe, over all streams."""
        peaks: dict[str, dict[str, float]] = {}
        for stream in self._streams.values():
            for phase, by_probe in stream.breaker.probe_peaks.items():
                known = peaks.setdefault(phase, {})
                for probe, peak in by_probe.items():
                    known[probe] = max(peak, known.get(probe, peak))
        return peaks

    def untripped_peaks(self) -> list[dict[Phase, dict[str, float]]]:
        """Highest running score by phase and probe of each stream that did not trip.

        As calibration takes them: those whose scores started with the completion are left out.
        """
        return [
            stream.breaker.probe_peaks
            for stream in self._streams.values()
            if stream.breaker.trip is None and "prompt" in stream.policy.phases
        ]

    @property
    def thresholds(self) -> dict[str, float]:
        """Lowest threshold that a stream was under, by probe."""
        lowest: dict[str, float] = {}
        for stream in self._streams.values():
            for probe, threshold in stream.breaker.thresholds.items():
                lowest[probe] = min(threshold, lowest.get(probe, threshold))
        return lowest

    @property
    def num_delivered_tokens(self) -> int:
        return sum(s.num_delivered for s in self._streams.values())

    @property
    def num_unscored(self) -> int:
        own = sum(stream.breaker.num_unscored for stream in self._streams.values())
        return own + self._num_unscored_within

    def add_request(self, num_choices: int) -> int:
        """Opens the next generate() call; the response's number of its first choice."""
        first = self._num_choices
        self._num_choices += num_choices
        return first

    def stream(self, policy: Policy, choice: int, num_prompt_tokens: int) -> _Stream:
        if choice not in self._streams:
            self._streams[choice] = _Stream(policy, num_prompt_tokens)
        return self._streams[choice]

    def add_faults(self, within: GuardSession) -> None:
        """Counts what must never happen in a session that a part of the request had of its own."""
        self.num_leaked += within.num_leaked
        self._num_unscored_within += within.num_unscored

    def delivered(self) -> None:
        if self.first_delivery_s is None:
            self.first_delivery_s = time.monotonic() - self._started_s


_session: ContextVar[GuardSession | None] = ContextVar("circuit_breakers_session", default=None)
_governing: ContextVar[Policy | None] = ContextVar("circuit_breakers_policy", default=None)


@contextmanager
def governed_by(policy: Policy | None) -> Iterator[None]:
    """Every session that is opened inside has this policy, unless it is given one of its own."""
    token = _governing.set(policy)
    try:
        yield
    finally:
        _governing.reset(token)


def current_session() -> GuardSession | None:
    """The session that generate() calls made here belong to."""
    return _session.get()


@contextmanager
def guard_session(policy: Policy | None = None) -> Iterator[GuardSession]:
    """Collects every generate() call made inside into one session.

    Args:
        policy: what its streams are judged by; None takes that of `governed_by`, or else the
            engine's own.
    """
    session = GuardSession(policy)
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)


class GuardedEngine:
    """Stands in for vLLM's EngineClient wherever its serving classes expect one."""

    def __init__(
        self,
        engine: Any,
        breaker: Breaker,
        mode: Mode,
        lora_request: Any,
        vllm_args: Any,
        loras: Mapping[str, Any] = MappingProxyType({}),
        target_fpr: float | None = None,
    ) -> None:
        """Puts the guard in front of `engine`.

        Args:
            lora_request: the dynamic breaker's, under which every request runs; None when merged.
            loras: LoRARequests that the operator lists, by name; any other one is refused.
            target_fpr: as the engine core has it, or the two would judge by different thresholds.
        """
        self._engine = engine
        self._lora_request = lora_request
        self.loras = loras
        self.breaker = breaker
        self.mode = mode
        self.policy = Policy.from_manifest(breaker.manifest, mode, target_fpr)
        """What a session without a policy is judged by."""
        self.vllm_args = vllm_args
        """Namespace of vLLM's own argument parser, for its serving classes."""

    def __getattr__(self, name: str) -> Any:
        if name in _PASSED_THROUGH:
            return getattr(self._engine, name)
        raise AttributeError(f"{name!r} of the engine is not reachable behind the guard")

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's generate, guarded: RequestOutputs whose every token has been scored and passed.

        A plain function, so that the session is the caller's, whoever iterates.

        Raises:
            ConfigError: the prompt is a stream of inputs, which could not be judged as one.
            UnguardedOutputError: while iterating; the engine gave out a token without a verdict.
        """
        if isinstance(prompt, AsyncGenerator):
            raise ConfigError("got a streaming prompt, expected a whole one; send it at once")
        params = sampling_params.clone()
        # kv_transfer_params and the like arrive here; none is for a client to set.
        params.extra_args = None
        kwargs["lora_request"] = self._adapter(kwargs.get("lora_request"))
        session = _session.get() or GuardSession()
        if session.policy is not None:
            params.extra_args = own_args(session.policy)
        first_choice = session.add_request(params.n)
        session.request_ids.append(request_id)
        outputs = self._engine.generate(prompt, params, request_id, **kwargs)
        delta = params.output_kind.name == "DELTA"
        return self._guarded(session, first_choice, request_id, outputs, delta)

    def _adapter(self, asked: Any) -> Any:
        if asked is None or self._lora_request is not None:
            return self._lora_request
        if asked.lora_name not in self.loras:
            raise ConfigError(
                f"got LoRA {asked.lora_name!r}, expected one that the operator lists: "
                f"{', '.join(self.loras) or 'there is none'}"
            )
        # The operator's own, whatever path came with the name.
        return self.loras[asked.lora_name]

    async def _guarded(
        self,
        session: GuardSession,
        first_choice: int,
        request_id: str,
        outputs: Any,
        delta: bool,
    ) -> AsyncGenerator[Any, None]:
        finished = False
        try:
            async for output in outputs:
                finished = output.finished
                num_prompt_tokens = len(output.prompt_token_ids)
                for completion in output.outputs:
                    choice = first_choice + completion.index
                    policy = session.policy or self.policy
                    stream = session.stream(policy, choice, num_prompt_tokens)
                    self._check(session, stream, completion, delta)
                if any(completion.token_ids for completion in output.outputs):
                    session.delivered()
                yield output
        except Exception as e:
            session.error = e
            raise
        finally:
            await outputs.aclose()
            if not finished:
                # vLLM aborts what it has queued; a request that failed on its way there is still
                # registered, and would stay so.
                await self._engine.abort(request_id)

    def _check(self, session: GuardSession, stream: _Stream, completion: Any, delta: bool) -> None:
        """Judges the scores that came with a completion, then its tokens.

        Raises:
            UnguardedOutputError: a token has no score, or lies at or past a trip.
        """
        scores: TokenScores | None = completion.guard
        breaker = stream.breaker
        if scores is not None:
            stream.scores = scores
            breaker.update(scores.since(breaker.num_seen))
            stream.stopped = scores.trip is not None
        stream.finish_reason = completion.finish_reason
        num_tokens = len(completion.token_ids)
        num_delivered = num_tokens + (stream.num_delivered if delta else 0)
        end = stream.num_prompt_tokens + num_delivered
        if num_delivered and end > breaker.num_scored:
            raise UnguardedOutputError(
                f"the engine gave out {end} tokens with {breaker.num_scored} scores; "
                "the guard plugin is not live in the engine core, restart the server"
            )
        if stream.policy.mode == "enforce" and breaker.trip is not None:
            num_leaked = end - breaker.trip.token_index if num_delivered else 0
            if num_leaked > 0:
                session.num_leaked += num_leaked
                raise UnguardedOutputError(
                    f"the engine gave out {num_leaked} tokens at or past the trip at token "
                    f"{breaker.trip.token_index}; the request was aborted"
                )
        stream.num_delivered = num_delivered
