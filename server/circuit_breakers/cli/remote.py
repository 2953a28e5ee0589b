"""A server that runs, as `score` and `chat` reach it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from circuit_breakers.errors import CircuitBreakersError, ConfigError

__all__ = ["DEFAULT_URL", "Answer", "ApiKeyOption", "RefusedError", "Remote", "UrlOption"]

DEFAULT_URL = "http://127.0.0.1:8000"
UrlOption = Annotated[str, typer.Option("--url", help="The server.")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key", help="Key, where the server wants one.", envvar="CIRCUIT_BREAKERS_API_KEY"
    ),
]

_TIMEOUT_S = 600


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    retry_after: str | None
    body: dict[str, Any]
    """Empty where it is no object."""

    @property
    def reason(self) -> str:
        """What the server says of an error."""
        error = self.body.get("error")
        # A proxy's may be text.
        return str(error.get("message", "no reason")) if isinstance(error, dict) else "no reason"


class RefusedError(CircuitBreakersError):
    """The server answers with an error."""

    def __init__(self, place: str, answer: Answer) -> None:
        super().__init__(f"got HTTP {answer.status} from {place}: {answer.reason}")
        self.answer = answer


class Remote:
    """Where the API is, and the key for it."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Connects to nothing yet.

        Args:
            url: with or without /v1 at its end.
        Raises:
            ConfigError: it is no URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"got --url {url!r}, expected one such as http://127.0.0.1:8000")
        self._kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self.place = parts.netloc.rpartition("@")[2]
        """Host and port, for people."""
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, route: str, body: Any = None) -> Answer:
        """A whole answer, of whatever status.

        Args:
            route: what follows /v1/ in the path.
            body: what is posted; None asks by GET.
        Raises:
            CircuitBreakersError: there is none.
        """
        with self._open(route, body) as response:
            return self._read(response)

    def stream(self, route: str, body: Any) -> Generator[dict[str, Any], None, None]:
        """The events of an answer, each an object, up to its end.

        Raises:
            RefusedError: while iterating; the status is not 200.
            CircuitBreakersError: while iterating; there is no answer, or it breaks off.
        """
        with self._open(route, body) as response:
            if response.status != 200:
                raise RefusedError(self.place, self._read(response))
            while line := self._line(response):
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if data:
                    yield self._object(data)
        raise CircuitBreakersError(f"{self.place}: the answer broke off; ask again")

    @contextmanager
    def _open(self, route: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        connection = self._kind(self.place, timeout=_TIMEOUT_S)
        try:
            with self._reported():
                if body is None:
                    connection.request("GET", self._path + route, headers=self._headers)
                else:
                    data = json.dumps(body).encode()
                    connection.request("POST", self._path + route, data, self._headers)
                response = connection.getresponse()
            yield response
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> Answer:
        with self._reported():
            body = json.loads(response.read())
        after = response.getheader("Retry-After")
        return Answer(response.status, after, body if isinstance(body, dict) else {})

    def _object(self, data: bytes) -> dict[str, Any]:
        with self._reported():
            found: dict[str, Any] = json.loads(data)
        return found

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        with self._reported():
            return response.readline()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise CircuitBreakersError(
                f"{self.place} does not answer ({type(e).__name__}); check --url, and that the "
                "server is ready"
            ) from e
