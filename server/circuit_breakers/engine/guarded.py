"""GuardedEngine: vLLM's engine client with the guard in front; every route generates through it.

The engine core has already withheld unscored tokens and stopped tripped requests. This layer pins
the adapter, strips what a client could use to get around, judges the delivered scores once more
with the same state machine, and refuses to pass on a token that its own verdict does not cover.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType
from typing import Any

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.engine.session import ChoiceStream, GuardSession, current_session
from circuit_breakers.errors import ConfigError, UnguardedOutputError
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.policy import Policy

__all__ = ["GuardedEngine"]

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
        session = current_session() or GuardSession()
        if session.policy is not None:
            params.extra_args = own_args(session.policy)
        first_choice = session.add_request(params.n)
        session.request_ids.append(request_id)
        outputs = self._engine.generate(prompt, params, request_id, **kwargs)
        return self._guarded(session, first_choice, request_id, outputs, params)

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
        params: Any,
    ) -> AsyncGenerator[Any, None]:
        finished = False
        delta = params.output_kind.name == "DELTA"
        try:
            async for output in outputs:
                finished = output.finished
                num_prompt_tokens = len(output.prompt_token_ids)
                for completion in output.outputs:
                    choice = first_choice + completion.index
                    policy = session.policy or self.policy
                    stream = session.stream(policy, choice, num_prompt_tokens)
                    stream.prompt_token_ids, stream.params = output.prompt_token_ids, params
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

    def _check(
        self, session: GuardSession, stream: ChoiceStream, completion: Any, delta: bool
    ) -> None:
        """Judges the scores that came with a completion, then its tokens.

        Raises:
            UnguardedOutputError: a token has no score, or lies at or past a trip.
        """
        if completion.guard is not None:
            stream.judge(completion.guard)
        stream.finish_reason = completion.finish_reason
        num_tokens = len(completion.token_ids)
        num_delivered = num_tokens + (stream.num_delivered if delta else 0)
        end = stream.num_prompt_tokens + num_delivered
        if num_delivered and end > stream.num_scored:
            raise UnguardedOutputError(
                f"the engine gave out {end} tokens with {stream.num_scored} scores; "
                "the guard plugin is not live in the engine core, restart the server"
            )
        if stream.policy.mode == "enforce" and stream.trip is not None:
            num_leaked = end - stream.trip.token_index if num_delivered else 0
            if num_leaked > 0:
                session.num_leaked += num_leaked
                raise UnguardedOutputError(
                    f"the engine gave out {num_leaked} tokens at or past the trip at token "
                    f"{stream.trip.token_index}; the request was aborted"
                )
        stream.num_delivered = num_delivered
