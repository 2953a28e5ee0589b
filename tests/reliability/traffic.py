"""Mixed traffic on one server, and what each client of it was told."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from ..server.api.conftest import MODEL

__all__ = ["BY_CHANCE", "STEADY", "Answer", "Choice", "Kind", "Traffic", "ask"]

_TIMEOUT_S = 600
"""The engine of a busy machine is slow."""
_PAUSE_AFTER_FAILURE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of request."""

    name: str
    path: str
    body: dict[str, Any]
    num_trips: int | None
    """Of one request on a server without a fault; None where sampling decides."""
    leaves_after: int | None = None
    """Events of a stream after which the client is gone; None stays to the end."""


def _chat(name: str, text: str, num_trips: int, **fields: Any) -> Kind:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 24, **fields}
    return Kind(name=name, path="/v1/chat/completions", body=body, num_trips=num_trips)


_PARIS = 7042
"""Token of " Paris" in SmolLM2's vocabulary, on which the breaker for words trips."""
_STORY: dict[str, Any] = {"prompt": "Once upon a time in Rome", "ignore_eos": True, "stream": True}
STEADY = (
    _chat("benign", "What is the capital of Italy?", 0),
    _chat("benign, streamed", "What is the capital of Italy?", 0, stream=True),
    _chat("trips", "What is the capital of France?", 1),
    _chat("trips, streamed", "What is the capital of France?", 1, stream=True),
    _chat("prompt trips", "Do you like the zebra?", 1),
    _chat("prompt trips, streamed", "Do you like the zebra?", 1, stream=True),
    Kind(
        name="two completions trip",
        path="/v1/completions",
        body={"prompt": "My favourite city is", "n": 2, "max_tokens": 8, "temperature": 1.0}
        | {"logit_bias": {str(_PARIS): 100}},
        num_trips=2,
    ),
    Kind(
        name="long, streamed",
        path="/v1/completions",
        body=_STORY | {"max_tokens": 64, "logit_bias": {str(_PARIS): -100}},
        num_trips=0,
    ),
    Kind(
        name="leaves midway",
        path="/v1/completions",
        body=_STORY | {"max_tokens": 200, "logit_bias": {str(_PARIS): -100}},
        num_trips=0,
        leaves_after=5,
    ),
    Kind(
        name="moderation",
        path="/v1/moderations",
        body={"input": ["What is the capital of Italy?", "Do you like the zebra?"]},
        num_trips=0,
    ),
)
"""Kinds whose trips are foreseen."""
BY_CHANCE = tuple(
    Kind(
        name="sampled, streamed",
        path="/v1/completions",
        body={"prompt": prompt, "n": 2, "max_tokens": 24, "temperature": 1.0, "stream": True}
        | {"logit_bias": {str(_PARIS): 3.0}},
        num_trips=None,
    )
    for prompt in ("My favourite city in the world is", "Last summer we travelled from Rome to")
)
"""Kinds that trip at some point or never."""


@dataclass
class Choice:
    """One text as it came over the wire."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    has_guard: bool = False


@dataclass
class Answer:
    """What one client was told."""

    kind: Kind
    began_s: float
    """On the monotonic clock, as `ended_s`."""
    ended_s: float = 0.0
    status: int | None = None
    """None where no answer came."""
    problem: str | None = None
    """Code of an error that the server named, or the class of what the client ran into."""
    request_id: str = ""
    retry_after: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    num_told_trips: int = 0
    """Trips that this client knows of."""

    @property
    def outcome(self) -> str:
        """In a few words, e.g. '200 stop', '503 engine_dead', 'cut off: ReadError'."""
        if self.status is None:
            return f"no answer: {self.problem}"
        if self.problem is not None:
            start = "200, then" if self.status == 200 else str(self.status)
            return f"{start} {self.problem}"
        reasons = {choice.finish_reason or "none" for choice in self.choices}
        return f"{self.status} {'+'.join(sorted(reasons)) or 'judged'}"

    @property
    def is_whole(self) -> bool:
        """It is what this kind gets from a server without a fault."""
        if self.kind.num_trips is not None and self.num_told_trips != self.kind.num_trips:
            return False
        if self.status == 400 and self.problem == "content_filter":
            return True  # a tripped prompt
        if self.status != 200 or self.problem is not None:
            return False
        # Half an answer that looks like a whole one would have no end, or no verdict.
        if self.kind.leaves_after is not None or self.kind.path == "/v1/moderations":
            return True
        return bool(self.choices) and all(
            choice.finish_reason is not None and choice.has_guard for choice in self.choices
        )


def ask(http: httpx.Client, kind: Kind) -> Answer:
    """One request, and what came of it; never raises for what a server or a network does."""
    answer = Answer(kind, time.monotonic())
    body = kind.body
    if kind.path != "/v1/moderations":
        body = {"temperature": 0, "model": MODEL, "return_token_ids": True} | body
    try:
        with http.stream("POST", kind.path, json=body) as response:
            _read(answer, response)
    except httpx.TransportError as e:
        answer.problem = type(e).__name__
    answer.ended_s = time.monotonic()
    return answer


def _read(answer: Answer, response: httpx.Response) -> None:
    answer.status = response.status_code
    answer.request_id = response.headers.get("x-request-id", "")
    answer.retry_after = response.headers.get("retry-after")
    if not response.headers["content-type"].startswith("text/event-stream"):
        _take(answer, json.loads(response.read()))
        return
    is_done = False
    for number, line in enumerate(line for line in response.iter_lines() if line):
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            is_done = True
        else:
            assert not is_done, "nothing comes after the end"
            _take(answer, json.loads(data))
        if number + 1 == answer.kind.leaves_after:
            return
    if not is_done and answer.problem is None:
        answer.problem = "no [DONE]"


def _take(answer: Answer, said: dict[str, Any]) -> None:
    """One event of a stream, or a whole body."""
    if (error := said.get("error")) is not None:
        answer.problem = error["code"]
        answer.num_told_trips += error["code"] == "content_filter"
    answer.prompt_ids += said.get("prompt_token_ids") or []
    for part in said.get("choices", ()):
        while len(answer.choices) <= part["index"]:
            answer.choices.append(Choice())
        choice = answer.choices[part["index"]]
        assert choice.finish_reason is None, "nothing comes after the end of a choice"
        answer.prompt_ids = answer.prompt_ids or part.get("prompt_token_ids") or []
        choice.text += part.get("text") or ""
        choice.text += (part.get("message") or part.get("delta") or {}).get("content") or ""
        choice.token_ids += part.get("token_ids") or []
        choice.finish_reason = part.get("finish_reason")
        choice.has_guard |= "guard" in part
        answer.num_told_trips += choice.finish_reason == "content_filter"


class Traffic:
    """Clients that ask one request after the other, until they are told to stop."""

    def __init__(
        self,
        url: str,
        key: str,
        kinds: Sequence[Kind],
        *,
        num_clients: int,
        pause_s: float = 0.0,
        on_answer: Callable[[Answer], None],
    ) -> None:
        """Args:
        pause_s: of each client between two requests.
        on_answer: is told of each answer, in the thread of its client.
        """
        self._url, self._key, self._kinds = url, key, kinds
        self._num_clients, self._pause_s = num_clients, pause_s
        self._on_answer = on_answer
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The clients ask while the context is open; each ends with the answer that it reads."""
        with ThreadPoolExecutor(self._num_clients) as pool:
            clients = [pool.submit(self._run, number) for number in range(self._num_clients)]
            try:
                yield
            finally:
                self._stop.set()
                for client in clients:
                    client.result()

    def _run(self, number: int) -> None:
        order = random.Random(number)
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT_S) as http:
            while not self._stop.is_set():
                answer = ask(http, order.choice(self._kinds))
                self._on_answer(answer)
                self._stop.wait(self._pause_s if answer.is_whole else _PAUSE_AFTER_FAILURE_S)
