"""`chat`: a conversation with a model through a server that runs, each token coloured by its score.

line -> POST /v1/chat/completions, guard.token_scores -> coloured tokens -> verdict of the turn
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from circuit_breakers.cli.apps import app, reported_errors
from circuit_breakers.cli.remote import DEFAULT_URL, ApiKeyOption, UrlOption
from circuit_breakers.errors import CircuitBreakersError
from circuit_breakers.remote_server import RefusedError, RemoteServer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["chat"]

_EXIT_TRIPPED = 3
_COMMANDS = "/reset forgets the conversation, /quit ends it"
_LEVELS = (
    (0.0, "bold white on red", "at its threshold or above"),
    (-2.0, "red", "up to 2 below"),
    (-4.0, "yellow", "up to 4"),
    (-8.0, "green", "up to 8"),
    (float("-inf"), "", "further"),
)
"""Least margin of a score to its threshold, in logits; its style; what the legend says."""


class _Piece(NamedTuple):
    text: str
    style: str


class _Verdict(NamedTuple):
    """What the guard said of one turn."""

    report: dict[str, Any]
    tripping_token: str | None
    """Its text, where the server told it."""

    def __str__(self) -> str:
        report = self.report
        scores = (
            "no score"
            if report["score"] is None
            else f"score {report['score']:.3f}, threshold {report['threshold']:.3f} "
            f"({report['probe']})"
        )
        if not report["tripped"]:
            return scores
        word = "" if self.tripping_token is None else f" {self.tripping_token!r}"
        seen = "" if report["mode"] == "enforce" else "; the server only observes"
        return (
            f"tripped in the {report['phase']} at token {report['token_index']}{word}: "
            f"{scores}{seen}"
        )


@app.command(
    epilog="Example: `circuit-breakers chat 'What is the capital of France?' --max-tokens 64`"
)
def chat(
    text: Annotated[
        str | None, typer.Argument(help="One message. [a conversation, one message a line]")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    system: Annotated[str | None, typer.Option(help="System message. [none]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 is deterministic. [the server's]")
    ] = None,
) -> None:
    """Chat through a running server, with each token coloured by its score.

    Colours need a terminal and an admin key, such as `serve --console` prints; NO_COLOR=1 leaves
    them out. In a conversation, /reset forgets it and /quit ends it; a turn that trips is left out
    of it. With TEXT the exit code is 0 for an answer, 3 for a trip, 1 for an error.
    """
    with reported_errors(exit_code=2):
        server = RemoteServer(url, api_key)
    screen = _Screen()
    with reported_errors():
        is_admin = _is_admin(server)
        if screen.has_colours and not is_admin:
            screen.note(
                "no colours: the server gives the scores of tokens to an admin key alone, such as "
                "serve --console prints"
            )
        conversation = _Conversation(
            server,
            system,
            max_tokens=max_tokens,
            temperature=temperature,
            wants_scores=screen.has_colours and is_admin,
        )
        if conversation.wants_scores:
            screen.legend()
        if text is None:
            _converse(conversation, screen)
        elif _take_turn(conversation, screen, text).report["tripped"]:
            raise typer.Exit(_EXIT_TRIPPED)


def _is_admin(server: RemoteServer) -> bool:
    """Whether the key is an admin's.

    Raises:
        CircuitBreakersError: the server is not there, not ready, without a breaker, or refuses
            the key.
    """
    answer = server.ask("GET", "/v1/breaker")
    if answer.status == 401:
        raise CircuitBreakersError(
            f"got HTTP 401 from {server.place}: {answer.reason}; set CIRCUIT_BREAKERS_API_KEY"
        )
    if answer.status == 404 or (answer.status == 200 and answer.fields.get("object") != "breaker"):
        raise CircuitBreakersError(
            f"got no breaker from {server.place}, expected a server with one; check --url"
        )
    if answer.status != 200:
        raise RefusedError(server.place, answer)
    # Only an admin sees all policies.
    return "policies" in answer.fields


def _converse(conversation: _Conversation, screen: _Screen) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited from now on)

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        screen.note(_COMMANDS)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            screen.end_line()
            return
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            screen.note("the conversation is forgotten")
        elif line.startswith("/"):
            screen.note(f"got {line.split()[0]}, expected a message, /reset or /quit")
        elif line:
            try:
                if _take_turn(conversation, screen, line).report["tripped"]:
                    screen.note("this turn is left out of the conversation")
            except KeyboardInterrupt:
                screen.end_line()
                screen.note("stopped; this turn is left out of the conversation")
            except CircuitBreakersError as error:
                screen.end_line()
                screen.error(f"{error}; this turn is left out of the conversation")


def _take_turn(conversation: _Conversation, screen: _Screen, text: str) -> _Verdict:
    """One message and its answer, on the screen; kept in the conversation unless it tripped.

    Raises:
        CircuitBreakersError: the server refuses it, or breaks off.
    """
    answer = ""
    verdict: _Verdict | None = None
    for part in conversation.ask(text):
        if isinstance(part, _Piece):
            screen.show(part)
            answer += part.text
        else:
            verdict = part
    screen.end_line()
    if verdict is None:
        raise CircuitBreakersError("got an answer without a guard, expected one; check --url")
    if verdict.report["tripped"]:
        screen.error(str(verdict))
    else:
        screen.note(str(verdict))
        conversation.keep(text, answer)
    return verdict


class _Conversation:
    """The messages so far, and how the next answer is asked for."""

    def __init__(
        self,
        server: RemoteServer,
        system: str | None,
        *,
        max_tokens: int,
        temperature: float | None,
        wants_scores: bool,
    ) -> None:
        self.wants_scores = wants_scores
        self._server = server
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)
        self._fields: dict[str, Any] = {"max_tokens": max_tokens, "stream": True}
        if temperature is not None:
            self._fields["temperature"] = temperature
        if wants_scores:
            self._fields["guard"] = {"token_scores": True}

    def reset(self) -> None:
        self._messages = list(self._start)

    def keep(self, text: str, answer: str) -> None:
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]

    def ask(self, text: str) -> Iterator[_Piece | _Verdict]:
        """The pieces of the answer as they come, and the verdict.

        Raises:
            CircuitBreakersError: while iterating; it is an error that is no trip.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {"messages": messages, **self._fields}
        try:
            with closing(self._server.stream("/v1/chat/completions", body)) as chunks:
                for chunk in chunks:
                    yield from _parts(chunk)
        except RefusedError as refused:
            verdict = _verdict_of_error(refused.answer.fields)
            if verdict is None:
                raise
            yield verdict


def _parts(chunk: dict[str, Any]) -> Iterator[_Piece | _Verdict]:
    if "error" in chunk:
        verdict = _verdict_of_error(chunk)
        if verdict is None:
            raise CircuitBreakersError(f"the answer broke off: {chunk['error'].get('message')}")
        yield verdict
    for choice in chunk.get("choices", ()):
        content = choice.get("delta", {}).get("content") or ""
        items = [i for i in choice.get("token_scores", ()) if i["phase"] == "completion"]
        pieces = [_Piece(item["token"], _style(item)) for item in items if item["token"]]
        # A refusal in the place of the text is no token's.
        if "".join(piece.text for piece in pieces) != content:
            pieces = [_Piece(content, "")]
        yield from pieces
        if choice.get("guard") is not None:
            yield _Verdict(choice["guard"], None)


def _verdict_of_error(body: dict[str, Any]) -> _Verdict | None:
    """That of a trip which was answered with an error; None for every other error."""
    error = body.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("guard"), dict):
        return None
    items = error.get("token_scores")
    return _Verdict(error["guard"], items[-1]["token"] if items else None)


def _style(item: dict[str, Any]) -> str:
    if item["score"] is None:
        return ""
    margin = item["score"] - item["threshold"]
    return next(style for least, style, _ in _LEVELS if margin >= least)


class _Screen:
    """The answer on standard output, all else on standard error."""

    def __init__(self) -> None:
        # Deferred: --help needs none of it.
        from rich.console import Console

        self._out: Console = Console(highlight=False)
        self._err: Console = Console(stderr=True, highlight=False)
        self.has_colours = self._out.color_system is not None and not self._out.no_color
        self._is_at_start = True
        """Of a line of the answer."""

    def show(self, piece: _Piece) -> None:
        if not piece.text:
            return
        # A terminal would obey an escape sequence, whoever wrote it.
        text = _without_controls(piece.text) if self._out.is_terminal else piece.text
        style = piece.style if self.has_colours else ""
        self._out.out(text, end="", style=style or None, highlight=False)
        self._out.file.flush()
        self._is_at_start = text.endswith("\n")

    def end_line(self) -> None:
        if not self._is_at_start:
            self._out.out("")
            self._is_at_start = True

    def legend(self) -> None:
        self._err.out("score of a token: ", end="")
        for number, (_, style, words) in enumerate(_LEVELS):
            self._err.out(", " if number else "", end="")
            self._err.out(words, end="", style=style or None)
        self._err.out("")

    def note(self, text: str) -> None:
        self._err.out(_without_controls(text), style="dim" if self.has_colours else None)

    def error(self, text: str) -> None:
        self._err.out(_without_controls(text), style="red" if self.has_colours else None)


def _without_controls(text: str) -> str:
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )
