"""The score of each token in the answer, for an admin who asks by `guard: {"token_scores": true}`.

    {"index", "phase", "token", "score", "probe", "threshold"}

Every position of prompt and completion that the guard has judged has one item, in order. The score
is that of the probe which is closest to a trip; null where none is judged. `token` is null where
its text is withheld: for the token that trips, and for what is replaced by a refusal.

A chunk of a stream has the items of the tokens whose text it brings, whatever the engine has judged
by then: vLLM says which tokens these are (its `return_token_ids`). Where a stop string holds text
back, a token comes with the chunk that has the end of its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from circuit_breakers.api.annotations import ReportSource
from circuit_breakers.api.errors import ApiError
from circuit_breakers.engine.session import ChoiceStream, GuardSession
from circuit_breakers.engine.token_texts import CompletionTexts, prompt_texts
from circuit_breakers.guard.closest_score import ClosestScores
from circuit_breakers.guard.decision import GuardReport

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Call

__all__ = ["TOKEN_SCORES", "TokenScoreAnnotator", "withheld"]

TOKEN_SCORES = "token_scores"  # noqa: S105 (the name of a field)
"""Field of a choice, and of the error that a tripped prompt is answered with."""

_ID_FIELDS = ("token_ids", "prompt_token_ids")


class TokenScoreAnnotator:
    """Writes the scores of each choice into the answer to one request."""

    watches = True

    def __init__(self, call: Call, session: GuardSession, tokenizer: Any) -> None:
        """Has vLLM name the tokens of each chunk.

        Raises:
            ApiError: 400 for a request with `echo`, whose text vLLM leaves out where it names them,
                or without its reasoning, where vLLM may not name them at all.
        """
        if getattr(call.request, "echo", False):
            raise ApiError(
                400,
                "'echo' is not served with guard.token_scores, which have the prompt anyway; "
                "remove one of them",
                code="unsupported_parameter",
                param="echo",
            )
        if not getattr(call.request, "include_reasoning", True):
            raise ApiError(
                400,
                "got include_reasoning false with guard.token_scores, which have every token; "
                "remove one of them",
                code="unsupported_parameter",
                param="include_reasoning",
            )
        self._session = session
        self._tokenizer = tokenizer
        self._keeps_ids = bool(call.request.return_token_ids)
        call.request.return_token_ids = True
        self._choices: dict[int, _ScoredChoice] = {}
        self._prompt_texts: dict[tuple[int, ...], list[str]] = {}
        """By token ids: the choices of a prompt share them."""

    def on_body(self, body: dict[str, Any], reports: ReportSource) -> None:
        for choice in body["choices"]:
            self._add(choice, has_ended=True)
        self._clean(body)

    def on_chunk(self, chunk: dict[str, Any], reports: ReportSource, *, is_first: bool) -> None:
        for choice in chunk["choices"]:
            self._add(choice, has_ended=choice.get("finish_reason") is not None)
        self._clean(chunk)

    def last_chunks(self, reports: ReportSource) -> list[dict[str, Any]]:
        return []

    def of_error(self, report: GuardReport) -> list[dict[str, Any]]:
        """The items of the choice that an error is about; no text of its completion."""
        for index in self._session.choices:
            stream = self._session.stream_for(index)
            if stream is not None and stream.breaker.report() == report:
                return self._scored(stream).take((), has_ended=True)
        return []

    def _add(self, choice: dict[str, Any], *, has_ended: bool) -> None:
        index, token_ids = choice["index"], choice.get("token_ids") or ()
        self._clean(choice)
        stream = self._session.stream_for(index)
        if stream is None:
            # The first chunks of all choices may come before all of them have run.
            choice[TOKEN_SCORES] = []
            return
        if index not in self._choices:
            self._choices[index] = self._scored(stream)
        choice[TOKEN_SCORES] = self._choices[index].take(token_ids, has_ended=has_ended)

    def _scored(self, stream: ChoiceStream) -> _ScoredChoice:
        return _ScoredChoice(stream, self._tokenizer, self._texts_of)

    def _texts_of(self, prompt_token_ids: Sequence[int]) -> list[str]:
        ids = tuple(prompt_token_ids)
        if ids not in self._prompt_texts:
            self._prompt_texts[ids] = prompt_texts(self._tokenizer, ids)
        return self._prompt_texts[ids]

    def _clean(self, part: dict[str, Any]) -> None:
        for name in () if self._keeps_ids else _ID_FIELDS:
            if name in part:
                part[name] = None


class _ScoredChoice:
    """The items of one choice, of which each is given out once."""

    def __init__(
        self,
        stream: ChoiceStream,
        tokenizer: Any,
        texts_of: Callable[[Sequence[int]], list[str]],
    ) -> None:
        self._stream = stream
        self._texts_of = texts_of
        self._scores = ClosestScores(stream.policy, stream.num_prompt_tokens)
        self._texts = CompletionTexts(tokenizer, stream.prompt_token_ids, stream.params)
        self._num_taken = 0

    def take(self, token_ids: Sequence[int], *, has_ended: bool) -> list[dict[str, Any]]:
        """The items that are new with these completion tokens.

        Args:
            has_ended: no further token comes; whatever else was judged is withheld.
        """
        stream, scores = self._stream, self._stream.scores
        self._texts.feed(token_ids)
        num_prompt_tokens = stream.num_prompt_tokens
        if scores is None or not (has_ended or stream.num_judged >= num_prompt_tokens):
            return []
        texts: list[str | None] = []
        if self._num_taken == 0:
            texts += self._texts_of(stream.prompt_token_ids)
        texts += self._texts.release(has_ended=has_ended)
        start = self._num_taken
        end = scores.num_tokens if scores.trip is None else scores.trip.token_index + 1
        if not has_ended:
            end = min(end, start + len(texts))
        texts = [*texts, *[None] * (end - start)][: end - start]
        self._num_taken = end
        found = self._scores.update(scores.rows(start, end))
        return [
            {
                "index": index,
                "phase": "prompt" if index < num_prompt_tokens else "completion",
                "token": text,
                "score": score.score if score else None,
                "probe": score.probe if score else None,
                "threshold": score.threshold if score else None,
            }
            for index, (text, score) in enumerate(zip(texts, found, strict=True), start)
        ]


def withheld(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a choice whose text is replaced: none of its completion's is in them."""
    return [item | {"token": None} if item["phase"] == "completion" else item for item in items]
