"""Whether an unmodified OpenAI client gets what it expects: each typed call once, on harmless text.

A call passes if the client's own types hold what OpenAI's API promises, and each answer its guard
report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import openai

from circuit_breakers.errors import EvaluationError
from circuit_breakers_training.gate.asking import harmful_canary
from circuit_breakers_training.gate.rows import Row
from circuit_breakers_training.gate.target import Target

__all__ = ["conformance"]

_ASKED: Final[Any] = [{"role": "user", "content": "Name three colours, please."}]
_TEXT: Final = "Three colours are"
_SHORT: Final = 24
"""Tokens of an answer."""
_UNKNOWN_MODEL: Final = "a-model-that-nobody-serves"


@dataclass(frozen=True, kw_only=True)
class _Client:
    api: openai.OpenAI
    target: Target

    @property
    def chat(self) -> dict[str, Any]:
        """Fields of a chat that every call shares."""
        return {
            "model": self.target.model.name,
            "messages": _ASKED,
            "temperature": 0,
            "max_tokens": _SHORT,
        }


def conformance(target: Target) -> list[Row]:
    """How many of the calls fail, by name."""
    failures = []
    with openai.OpenAI(
        base_url=f"{target.server.base_url}/v1",
        # Servers without keys ask for none, but the client refuses to start without.
        api_key=target.settings.api_key or "none",
        max_retries=4,
    ) as api:
        client = _Client(api=api, target=target)
        for name, call in _CALLS.items():
            try:
                call(client)
            except (EvaluationError, openai.OpenAIError) as e:
                failures.append(f"{name}: {type(e).__name__} {_said(e)}".rstrip())
            except (AttributeError, TypeError, LookupError, ValueError) as e:
                failures.append(f"{name}: an answer of another shape ({type(e).__name__})")
    return [
        Row(
            name="failures",
            what="typed calls of the openai client that fail",
            count=len(_CALLS),
            value=len(failures),
            bar=target.bars["conformance.failures"],
            source=f"openai {openai.__version__}",
            notes=tuple(failures),
        )
    ]


def _said(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"{error.status_code} {error.code or ''}"
    return str(error) if isinstance(error, EvaluationError) else ""


def _expect(holds: bool, what: str) -> None:
    """Passes if it holds; `what` was expected."""
    if not holds:
        raise EvaluationError(f"expected {what}")


def _guarded(answer: Any) -> None:
    guard = (answer.model_extra or {}).get("guard")
    _expect(isinstance(guard, dict) and guard.get("tripped") is False, "a guard report, no trip")


def _models_list(c: _Client) -> None:
    _expect(c.target.model.name in [model.id for model in c.api.models.list()], "the model's name")


def _models_retrieve(c: _Client) -> None:
    model = c.api.models.retrieve(c.target.model.name)
    _expect((model.id, model.object) == (c.target.model.name, "model"), "the model")


def _model_unknown(c: _Client) -> None:
    try:
        c.api.chat.completions.create(**{**c.chat, "model": _UNKNOWN_MODEL})
    except openai.NotFoundError as e:
        _expect(e.code == "model_not_found", "code model_not_found")
    else:
        raise EvaluationError("expected a NotFoundError")


def _chat_whole(c: _Client) -> None:
    answer = c.api.chat.completions.create(**c.chat)
    (choice,) = answer.choices
    _expect(answer.object == "chat.completion" and bool(choice.message.content), "a text")
    _expect(choice.finish_reason in ("stop", "length"), "an end")
    usage = answer.usage
    _expect(
        usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
        "usage that adds up",
    )
    _guarded(answer)


def _chat_stream(c: _Client) -> None:
    chunks = list(
        c.api.chat.completions.create(**c.chat, stream=True, stream_options={"include_usage": True})
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    _expect(bool("".join(choice.delta.content or "" for choice in choices)), "a text")
    ends = [choice for choice in choices if choice.finish_reason is not None]
    _expect(len(ends) == 1 and ends[0] is choices[-1], "one end, in the last choice")
    _guarded(ends[0])
    _expect(chunks[-1].usage is not None and not chunks[-1].choices, "usage in the last chunk")


def _chat_n(c: _Client) -> None:
    answer = c.api.chat.completions.create(**{**c.chat, "n": 2, "temperature": 1})
    _expect([choice.index for choice in answer.choices] == [0, 1], "choices 0 and 1")
    for choice in answer.choices:
        _expect("guard" in (choice.model_extra or {}), "a guard report of each")


def _chat_seed(c: _Client) -> None:
    # Few tokens: over many, other requests in the batch may tip a close call.
    fields = {**c.chat, "temperature": 1, "max_tokens": 4, "seed": 7}
    try:
        answers = [c.api.chat.completions.create(**fields) for _ in range(2)]
    except openai.BadRequestError as e:
        # vLLM's sampler for CPUs has no seeds of requests, which the server says.
        _expect(e.param == "seed", "an answer, or a refusal that names 'seed'")
    else:
        texts = [answer.choices[0].message.content for answer in answers]
        _expect(texts[0] == texts[1], "one seed to give one text")


def _chat_stop(c: _Client) -> None:
    whole = c.api.chat.completions.create(**c.chat).choices[0].message.content or ""
    words = whole.split()
    _expect(len(words) > 1, "an answer of several words")
    (choice,) = c.api.chat.completions.create(**c.chat, stop=[words[1]]).choices
    _expect(choice.finish_reason == "stop", "finish reason stop")
    _expect(words[1] not in (choice.message.content or ""), "the text before the stop string")


def _chat_logprobs(c: _Client) -> None:
    (choice,) = c.api.chat.completions.create(**c.chat, logprobs=True, top_logprobs=2).choices
    tokens = (choice.logprobs and choice.logprobs.content) or []
    _expect(bool(tokens) and all(token.logprob <= 0 for token in tokens), "logprobs of tokens")
    _expect(all(len(token.top_logprobs) >= 2 for token in tokens), "two candidates of each")


def _completion_whole(c: _Client) -> None:
    answer = c.api.completions.create(
        model=c.target.model.name, prompt=_TEXT, temperature=0, max_tokens=_SHORT
    )
    _expect(answer.object == "text_completion" and bool(answer.choices[0].text), "a text")
    _guarded(answer)


def _completion_stream(c: _Client) -> None:
    chunks = list(
        c.api.completions.create(
            model=c.target.model.name, prompt=_TEXT, temperature=0, max_tokens=_SHORT, stream=True
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    _expect(bool("".join(choice.text for choice in choices)), "a text")
    _expect(choices[-1].finish_reason in ("stop", "length"), "an end")
    _guarded(choices[-1])


def _response(c: _Client) -> None:
    answer = c.api.responses.create(
        model=c.target.model.name, input=_TEXT, temperature=0, max_output_tokens=_SHORT
    )
    _expect(answer.status in ("completed", "incomplete") and bool(answer.output_text), "a text")
    _guarded(answer)


def _moderation(c: _Client) -> None:
    (result,) = c.api.moderations.create(input=_TEXT).results
    _expect(result.flagged is False, "harmless text not to be flagged")
    scores = result.category_scores.model_extra or {}
    judged = {probe["name"] for probe in c.target.served["probes"]}
    _expect(bool(scores) and set(scores) <= judged, "a score of each probe")


def _error_unknown_field(c: _Client) -> None:
    try:
        c.api.chat.completions.create(**c.chat, extra_body={"no_such_field": 1})
    except openai.BadRequestError as e:
        _expect((e.code, e.param) == ("unknown_parameter", "no_such_field"), "its code and name")
    else:
        raise EvaluationError("expected a BadRequestError")


def _error_wrong_type(c: _Client) -> None:
    try:
        c.api.chat.completions.create(**{**c.chat, "temperature": "hot"})
    except openai.BadRequestError as e:
        _expect(bool(e.code), "a code")
    else:
        raise EvaluationError("expected a BadRequestError")


def _trip(c: _Client) -> None:
    try:
        body = harmful_canary(c.target)
        own = {"add_generation_prompt", "continue_final_message"} & body.keys()
        c.api.chat.completions.create(
            **{name: value for name, value in body.items() if name not in own},
            extra_body={name: body[name] for name in own},
        )
    except openai.BadRequestError as e:
        _expect(e.code == "content_filter", "code content_filter")
    else:
        raise EvaluationError("expected a BadRequestError for the breaker's harmful canary")


_CALLS: Final[Mapping[str, Callable[[_Client], None]]] = {
    "models.list": _models_list,
    "models.retrieve": _models_retrieve,
    "an unknown model": _model_unknown,
    "chat": _chat_whole,
    "chat, stream": _chat_stream,
    "chat, n": _chat_n,
    "chat, seed": _chat_seed,
    "chat, stop": _chat_stop,
    "chat, logprobs": _chat_logprobs,
    "completions": _completion_whole,
    "completions, stream": _completion_stream,
    "responses": _response,
    "moderations": _moderation,
    "an unknown field": _error_unknown_field,
    "a field of another type": _error_wrong_type,
    "a trip": _trip,
}
