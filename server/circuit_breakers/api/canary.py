"""Canaries: conversations with a known verdict, sent through the live engine.

    at the start, before it may serve ─► every so often ─► one fails: not ready ─► all pass: ready

They go the way of every request: template, tokenizer, engine, probe, verdict. A guard that does not
trip on a harmful one, or does on a benign one, is not live. They are nobody's requests: no policy
of a caller's, no place among those that run, no entry in metrics of requests or audit log.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from circuit_breakers.api.errors import not_ready
from circuit_breakers.api.service import Service
from circuit_breakers.api.serving import Serving
from circuit_breakers.artifact.manifest import Canary
from circuit_breakers.engine.session import governed_by, guard_session
from circuit_breakers.errors import NotReadyError
from circuit_breakers.guard.decision import GuardReport

__all__ = ["check_verdict", "run_canaries", "watch_canaries", "watched"]

logger = logging.getLogger(__name__)

_MAX_TOKENS = 32
"""Tokens that the model may write on a canary that ends with the user; a prefilled one gets 1."""
_ANSWER_S = 600.0
"""An engine that takes longer is stuck; under load a canary waits in the engine's line."""
_RETRY_S = 15.0
"""Pause after a failed run, where the interval is longer."""


async def run_canaries(service: Service, serving: Serving) -> None:
    """Passes when every canary gets the verdict that it is labelled with, from each engine.

    Raises:
        NotReadyError: naming the first one that does not.
    """
    try:
        # One after the other, so that at most one stands in the way of a request.
        for engine in range(serving.num_engines):
            for i, canary in enumerate(serving.guarded.breaker.manifest.canaries):
                check_verdict(i, canary, await _judge(service, serving, engine, i, canary))
    except NotReadyError:
        service.health_metrics.record_canaries(passed=False)
        raise
    service.health_metrics.record_canaries(passed=True)


@asynccontextmanager
async def watched(service: Service, serving: Serving) -> AsyncIterator[None]:
    """Runs `watch_canaries` while inside."""
    task = asyncio.create_task(watch_canaries(service, serving))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def watch_canaries(service: Service, serving: Serving) -> None:
    """Runs the canaries every so often, as the settings say, and takes readiness from them."""
    interval_s = service.settings.canary_interval_s
    while interval_s > 0:
        failed = service.failed_canary is not None
        await asyncio.sleep(min(interval_s, _RETRY_S) if failed else interval_s)
        if service.dead:
            return
        try:
            await run_canaries(service, serving)
        except NotReadyError as e:
            if service.dead:
                return  # requests end with that, which is the reason
            logger.error("not ready: %s", e)
            service.failed_canary = str(e)
            # Tokens of an engine whose guard is not what it was are nobody's to have.
            service.admission.end_all(not_ready(str(e)))
        else:
            if failed:
                logger.warning("ready again: every canary has its verdict")
            service.failed_canary = None


def check_verdict(number: int, canary: Canary, report: GuardReport | None) -> None:
    """Passes when the report of a canary is what its label says; the mode does not matter.

    Raises:
        NotReadyError: it is not, or there is no score to tell by.
    """
    name = f"canary {number} ({canary.label})"
    if report is None or report.score is None or report.num_unscored > 0:
        raise NotReadyError(
            f"{name} got no score, expected one for every token; the guard plugin is not live in "
            "the engine: check VLLM_PLUGINS, and that vLLM is of a tested version"
        )
    if report.tripped != (canary.label == "harmful"):
        raise NotReadyError(
            f"{name} {'tripped' if report.tripped else 'passed'}: score {report.score:.3f} of "
            f"probe {report.probe!r}, threshold {report.threshold:.3f}; the engine's scores are "
            "not those that the breaker was calibrated on: check --dtype, --adapter and the chat "
            "template, or train the breaker again"
        )


async def _judge(
    service: Service, serving: Serving, engine: int, number: int, canary: Canary
) -> GuardReport | None:
    """The guard's report on a canary.

    Raises:
        NotReadyError: the engine gave no answer.
    """
    prefilled = canary.messages[-1].role == "assistant"
    request = {
        "messages": [message.model_dump() for message in canary.messages],
        "temperature": 0,
        "max_tokens": 1 if prefilled else _MAX_TOKENS,
        "add_generation_prompt": not prefilled,
        "continue_final_message": prefilled,
    }
    # None of a caller's, whoever it is that this runs for.
    with governed_by(None), guard_session() as session:
        try:
            async with asyncio.timeout(_ANSWER_S):
                call = serving.parse("chat", request, max_choices=1)
                # Scores of cached tokens are old ones, which a dead probe would still pass with.
                call.request.cache_salt = secrets.token_hex(16)
                if serving.num_engines > 1:
                    call.ask_engine(engine)
                await serving.start(call)
        except Exception as e:
            raise NotReadyError(
                f"canary {number} ({canary.label}) got no answer ({str(e) or type(e).__name__}), "
                "expected its verdict; see the engine's log"
            ) from e
        report = session.report_for(0)
    if report is not None:
        service.metrics.record_scored(report.num_scored)
    return report
