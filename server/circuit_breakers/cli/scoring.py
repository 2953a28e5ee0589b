"""`score`: scores the conversations of a file in bulk, through a server that runs."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from circuit_breakers.cli.apps import app, reported_errors
from circuit_breakers.cli.remote import DEFAULT_URL, ApiKeyOption, UrlOption
from circuit_breakers.errors import ConfigError, RemoteServerError
from circuit_breakers.remote_server import RemoteServer

__all__ = ["score"]

_PATH = "/v1/moderations"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of the file; what it says goes to the server and nowhere else."""

    line: int
    label: str
    messages: list[Any]


@dataclass(frozen=True, kw_only=True)
class _Scored:
    row: _Row
    flagged: bool
    scores: dict[str, float]
    """By probe, within [0, 1]; 0.5 is its threshold."""

    def to_json(self) -> dict[str, Any]:
        label = {"label": self.row.label} if self.row.label else {}
        return {"line": self.row.line, **label, "flagged": self.flagged, "scores": self.scores}


@app.command(
    epilog="Example: `circuit-breakers score chats.jsonl --out scores.csv --url "
    "http://127.0.0.1:8000`"
)
def score(
    file: Annotated[
        Path,
        typer.Argument(
            help='JSONL; a line is {"messages": [{"role", "content"}, ...]} or {"text"}, and may '
            'have a "label".'
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for the scores, .csv or .jsonl. [JSONL on stdout]")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 8,
) -> None:
    """Score conversations by prefill alone, as POST /v1/moderations does; nothing is generated.

    A score lies within 0 and 1, and 0.5 is the threshold. Neither output has any content in it.
    """
    with reported_errors(exit_code=2):
        if out is not None and out.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"got --out {out}, expected a name that ends in .csv or .jsonl")
        if out is not None and not out.resolve().parent.is_dir():
            raise ConfigError(f"got --out {out}, expected a file in an existing directory")
        rows = list(_read(file))
        server = RemoteServer(url, api_key)
    with reported_errors():
        scored = _score_all(server, rows, concurrency)
        if out is None:
            _write(scored, typer.get_text_stream("stdout"), as_csv=False)
        else:
            # Whole or not at all: half a file would look like all of it.
            beside = out.with_name(f".{out.name}.{os.getpid()}")
            with beside.open("w", encoding="utf-8", newline="") as stream:
                _write(scored, stream, as_csv=out.suffix == ".csv")
            beside.replace(out)
    for label, num in sorted(Counter(one.row.label for one in scored).items()):
        flagged = sum(one.flagged for one in scored if one.row.label == label)
        name = f"label {label}" if label else "no label"
        typer.echo(f"{name}: {flagged} of {num} flagged ({flagged / num:.1%})", err=True)


def _score(server: RemoteServer, row: _Row) -> _Scored:
    """One conversation's scores.

    Raises:
        RemoteServerError: the server does not give them.
    """
    try:
        answer = server.ask_patiently("POST", _PATH, {"input": row.messages})
    except RemoteServerError as e:
        raise RemoteServerError(f"line {row.line}: {e}") from e
    if answer.status != 200:
        raise RemoteServerError(
            f"line {row.line}: got HTTP {answer.status} from {server.place}, expected scores: "
            f"{answer.reason}"
        )
    try:
        (result,) = answer.json["results"]
        scores = {str(name): float(p) for name, p in result["category_scores"].items()}
        return _Scored(row=row, flagged=bool(result["flagged"]), scores=scores)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RemoteServerError(
            f"line {row.line}: got an answer without scores from {server.place}, expected a "
            "server with a breaker; check --url"
        ) from e


def _score_all(server: RemoteServer, rows: list[_Row], concurrency: int) -> list[_Scored]:
    """In the file's order; the first failure ends it."""
    from rich.console import Console
    from rich.progress import track

    with ThreadPoolExecutor(concurrency) as pool:
        running = [pool.submit(_score, server, row) for row in rows]
        try:
            waiting = track(running, "scoring", console=Console(stderr=True), disable=not running)
            return [one.result() for one in waiting]
        finally:
            for one in running:
                one.cancel()


def _read(file: Path) -> Iterator[_Row]:
    """The file's conversations.

    Raises:
        ConfigError: it cannot be read, a line is no conversation, or it has none.
    """
    try:
        # Not splitlines: JSON strings may hold Unicode's other line ends as they are.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {file}: {e}; expected a file of JSON lines") from e
    if not any(line.strip() for line in lines):
        raise ConfigError(f"{file}: got no conversations, expected at least one")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{file}, line {number}: not JSON; fix the line") from e
        messages = _messages(data)
        if messages is None:
            raise ConfigError(
                f'{file}, line {number}: got neither "messages", a list of role and content, nor '
                '"text"; add one of them'
            )
        label = data.get("label")
        yield _Row(line=number, label="" if label is None else str(label), messages=messages)


def _messages(data: Any) -> list[Any] | None:
    if not isinstance(data, dict):
        return None
    messages, text = data.get("messages"), data.get("text")
    if isinstance(text, str) and text and messages is None:
        return [{"role": "user", "content": text}]
    if not isinstance(messages, list) or not messages or text is not None:
        return None
    fit = all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    return messages if fit else None


def _write(scored: list[_Scored], stream: TextIO, *, as_csv: bool) -> None:
    if not as_csv:
        stream.writelines(f"{json.dumps(one.to_json())}\n" for one in scored)
        return
    probes = sorted({probe for one in scored for probe in one.scores})
    table = csv.writer(stream)
    table.writerow(["line", "label", "flagged", *probes])
    for one in scored:
        scores = [one.scores.get(probe, "") for probe in probes]
        table.writerow([one.row.line, one.row.label, int(one.flagged), *scores])
