"""Streams that are checked as they are read; otherwise openai's own."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar, get_args

import openai

from circuit_breakers_client.answers import Rules, StreamWatch
from circuit_breakers_client.openai_hooks import leave_to_stream
from circuit_breakers_client.report import GuardReport

__all__ = ["AsyncGuardedStream", "GuardedStream", "guarded_stream_class"]

T = TypeVar("T")


class GuardedStream(openai.Stream[T], Generic[T]):
    """A stream that raises in place of the chunk that ends it, where its client's rules say so."""

    def __init__(self, *, client: Any, **arguments: Any) -> None:
        super().__init__(client=client, **arguments)
        leave_to_stream(self.response)
        rules: Rules = client._rules
        self._watch = StreamWatch(rules)

    @property
    def guard(self) -> GuardReport | None:
        """What the breaker saw; None until the last chunk was read."""
        return self._watch.report

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            item = super().__next__()
            self._watch.see(item)
        except StopIteration:
            self._watch.see_end()
            raise
        except openai.APIError as error:
            self._watch.see_error(error)
            raise
        except openai.OpenAIError:
            self.close()
            raise
        return item


class AsyncGuardedStream(openai.AsyncStream[T], Generic[T]):
    """The same for an asynchronous client."""

    def __init__(self, *, client: Any, **arguments: Any) -> None:
        super().__init__(client=client, **arguments)
        leave_to_stream(self.response)
        rules: Rules = client._rules
        self._watch = StreamWatch(rules)

    @property
    def guard(self) -> GuardReport | None:
        """What the breaker saw; None until the last chunk was read."""
        return self._watch.report

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            item = await super().__anext__()
            self._watch.see(item)
        except StopAsyncIteration:
            self._watch.see_end()
            raise
        except openai.APIError as error:
            self._watch.see_error(error)
            raise
        except openai.OpenAIError:
            await self.close()
            raise
        return item


def guarded_stream_class(kind: type[Any], stream_cls: Any) -> Any:
    """`kind` of the chunks that openai asked for, e.g. GuardedStream[ChatCompletionChunk]."""
    (chunk,) = get_args(stream_cls)
    return kind[chunk]
