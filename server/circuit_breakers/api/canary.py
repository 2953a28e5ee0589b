"""Canaries: conversations with a known verdict, sent through the live engine before it may serve.

They go the way of every request: template, tokenizer, engine, probe, verdict. A guard that does not
trip on a harmful one, or does on a benign one, is not live.
"""

from __future__ import annotations

from circuit_breakers.api.serving import Serving
from circuit_breakers.artifact.manifest import Canary
from circuit_breakers.engine.guarded import guard_session
from circuit_breakers.errors import NotReadyError
from circuit_breakers.guard.decision import GuardReport

__all__ = ["check_verdict", "run_canaries"]

_MAX_TOKENS = 32
"""Tokens that the model may write on a canary that ends with the user; a prefilled one gets 1."""


async def run_canaries(serving: Serving) -> None:
    """Passes when every canary of the breaker gets the verdict that it is labelled with.

    Raises:
        NotReadyError: naming the first one that does not.
    """
    for i, canary in enumerate(serving.guarded.breaker.manifest.canaries):
        check_verdict(i, canary, await _judge(serving, canary))


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


async def _judge(serving: Serving, canary: Canary) -> GuardReport | None:
    prefilled = canary.messages[-1].role == "assistant"
    request = {
        "messages": [message.model_dump() for message in canary.messages],
        "temperature": 0,
        "max_tokens": 1 if prefilled else _MAX_TOKENS,
        "add_generation_prompt": not prefilled,
        "continue_final_message": prefilled,
    }
    with guard_session() as session:
        await serving.start(serving.parse("chat", request, max_choices=1))
        return session.report_for(0)
