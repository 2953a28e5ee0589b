"""Where the guard report of something is."""

from __future__ import annotations

import openai

from circuit_breakers_client.answers import guard_in
from circuit_breakers_client.errors import TrippedError
from circuit_breakers_client.openai_hooks import raw_stream
from circuit_breakers_client.report import (
    GuardReport,
    TokenScore,
    field_of,
    parse_token_scores,
)
from circuit_breakers_client.streams import AsyncGuardedStream, GuardedStream

__all__ = ["guard_of", "token_scores_of"]


def guard_of(source: object) -> GuardReport | None:
    """The guard report of an answer, in whatever form it comes; None where it carries none.

    Args:
        source: an answer of one of openai's methods, a choice of it, a chunk or event of a stream,
            a stream of this package's clients that was read to its end (the helpers of
            `chat.completions.stream` and `responses.stream` too), an error, or plain JSON.
    """
    if isinstance(source, TrippedError):
        return source.report
    if isinstance(source, openai.APIError):
        return guard_in(source.body)
    stream = raw_stream(source) or source
    if isinstance(stream, GuardedStream | AsyncGuardedStream):
        return stream.guard
    return guard_in(source)


def token_scores_of(source: object) -> tuple[TokenScore, ...] | None:
    """The score of each token, where it was asked for by `tighten(token_scores=True)`, or None.

    Args:
        source: a choice of an answer, or of a chunk, which has those that are new; the error for a
            prompt that tripped; or plain JSON of these.
    """
    if isinstance(source, TrippedError):
        source = source.__cause__
    if isinstance(source, openai.APIError):
        source = source.body
    for place in (source, field_of(source, "error")):
        if (found := parse_token_scores(field_of(place, "token_scores"))) is not None:
            return found
    return None
