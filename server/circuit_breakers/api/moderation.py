"""OpenAI's moderation objects, filled with what the probes found.

A category is a probe. Its score is the logistic function of how far the probe's highest running
score lies above its threshold: within [0, 1], growing with it, and 0.5 at the threshold. A category
is flagged where the probe trips, in observe mode too.

    POST /v1/moderations           results of whole texts or conversations
    "moderation" of a request      input and output of the answer that is being given
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from circuit_breakers.api.annotations import ReportSource
from circuit_breakers.api.errors import ApiError
from circuit_breakers.guard.decision import Phase

__all__ = [
    "ChatModeration",
    "ModerationRequest",
    "ResponseModeration",
    "check_moderation_model",
    "conversations",
    "moderation_request",
    "moderation_result",
]

_OPENAI_MODELS = (
    "omni-moderation-2024-09-26",
    "omni-moderation-latest",
    "text-moderation-latest",
    "text-moderation-stable",
)
"""What OpenAI's clients ask for by themselves; the answer names the breaker."""

_UNKNOWN = {
    "type": "error",
    "code": "unscored",
    "message": "a token came back without a score; nothing can be said",
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _PhasePolicy(_Strict):
    mode: Literal["score", "block"]


class _Policy(_Strict):
    input: _PhasePolicy | None = None
    output: _PhasePolicy | None = None


class ModerationRequest(_Strict):
    """The `moderation` field of a request."""

    model: str
    policy: _Policy | None = None

    @property
    def blocked_phases(self) -> frozenset[Phase]:
        """Where a trip must stop the request, whatever the server's mode; nothing is loosened."""
        policy = self.policy or _Policy()
        phases: dict[Phase, _PhasePolicy | None] = {
            "prompt": policy.input,
            "completion": policy.output,
        }
        return frozenset(name for name, part in phases.items() if part and part.mode == "block")


def moderation_request(value: Any, known_models: tuple[str, ...]) -> ModerationRequest | None:
    """The `moderation` field as a value; None where the client asks for none.

    Raises:
        ApiError: 400, naming what does not fit; 404 for another moderation model.
    """
    if value is None:
        return None
    try:
        request = ModerationRequest.model_validate(value)
    except ValidationError as e:
        problem = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, ("moderation", *problem["loc"])))
        raise ApiError(
            400,
            f"{where}: {problem['msg'].lower()}; expected "
            '{"model": ..., "policy": {"input": {"mode": "score"}, "output": {"mode": "block"}}}',
            code="invalid_value",
            param=where,
        ) from e
    check_moderation_model(request.model, known_models, param="moderation.model")
    return request


def check_moderation_model(name: Any, known_models: tuple[str, ...], *, param: str) -> None:
    """Passes for a name of the one moderation model that is served, and for OpenAI's own ones.

    Raises:
        ApiError: 404.
    """
    if name is not None and name not in (*known_models, *_OPENAI_MODELS):
        raise ApiError(
            404,
            f"got moderation model {name!r}, expected one of {', '.join(known_models)}; leave it "
            "out, or name one of them",
            code="model_not_found",
            param=param,
        )


def moderation_result(margins: Mapping[str, float]) -> dict[str, Any]:
    """One result of OpenAI's POST /v1/moderations.

    Args:
        margins: by probe, its highest running score less its threshold.
    """
    categories = {name: margin >= 0 for name, margin in margins.items()}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": {name: _logistic(margin) for name, margin in margins.items()},
        "category_applied_input_types": {name: ["text"] for name in margins},
    }


def _logistic(margin: float) -> float:
    # Written so that no exponential overflows.
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    odds = math.exp(margin)
    return odds / (1 + odds)


def conversations(given: Any, *, max_inputs: int) -> list[list[dict[str, Any]]]:
    """The conversations to judge in the `input` of a moderation: one for each result.

    A text is put where the breaker was calibrated: as the user's turn. A list of parts is one turn;
    a list of messages is one conversation.

    Raises:
        ApiError: 400, there is nothing to judge, or too much.
    """
    if isinstance(given, str):
        found: list[Any] = [given]
    elif isinstance(given, list) and given and all(isinstance(part, str) for part in given):
        found = given
    elif isinstance(given, list) and given and all(isinstance(part, dict) for part in given):
        found = [given]
    else:
        raise ApiError(
            400,
            "got neither texts nor messages, expected a text, a list of texts, or a conversation "
            "as a list of {role, content}",
            code="invalid_value",
            param="input",
        )
    if len(found) > max_inputs:
        raise ApiError(
            400,
            f"got {len(found)} texts in one request, expected at most {max_inputs}; send several "
            "requests, or raise --max-choices on the server",
            code="invalid_value",
            param="input",
        )
    return [_conversation(one) for one in found]


def _conversation(one: Any) -> list[dict[str, Any]]:
    if isinstance(one, list) and all("role" in message for message in one):
        return one
    return [{"role": "user", "content": one}]


@dataclass(frozen=True)
class _Moderation:
    """Writes what the request's `moderation` field asks for into the answer."""

    model: str
    """Name of the breaker."""
    num_choices: int
    watches: bool = False

    def on_chunk(self, chunk: dict[str, Any], reports: ReportSource, *, is_first: bool) -> None:
        """Says nothing before all is judged."""

    def on_body(self, body: dict[str, Any], reports: ReportSource) -> None:
        body["moderation"] = self.result(reports)

    def last_chunks(self, reports: ReportSource) -> list[dict[str, Any]]:
        return [{"moderation": self.result(reports)}]

    def result(self, reports: ReportSource) -> dict[str, Any]:
        raise NotImplementedError

    def _named(self, margins: Mapping[str, float]) -> dict[str, Any]:
        return {"type": "moderation_result", "model": self.model, **moderation_result(margins)}


class ChatModeration(_Moderation):
    """`moderation` of a chat completion: a list of results for each phase, one for each choice."""

    def result(self, reports: ReportSource) -> dict[str, Any]:
        # All choices have the same prompt.
        return {
            "input": self._results(reports, "prompt", 1),
            "output": self._results(reports, "completion", self.num_choices),
        }

    def _results(self, reports: ReportSource, phase: Phase, num_results: int) -> dict[str, Any]:
        found = [reports.margins_for(choice, phase) for choice in range(num_results)]
        known = [margins for margins in found if margins is not None]
        if len(known) < num_results:
            return dict(_UNKNOWN)
        return {
            "type": "moderation_results",
            "model": self.model,
            "results": [self._named(margins) for margins in known],
        }


class ResponseModeration(_Moderation):
    """`moderation` of a response: one result for each phase."""

    def result(self, reports: ReportSource) -> dict[str, Any]:
        phases: tuple[tuple[str, Phase], ...] = (("input", "prompt"), ("output", "completion"))
        found = ((name, reports.margins_for(0, phase)) for name, phase in phases)
        return {
            name: dict(_UNKNOWN) if margins is None else self._named(margins)
            for name, margins in found
        }
