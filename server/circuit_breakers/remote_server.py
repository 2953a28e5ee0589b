"""A server that runs somewhere: one request on a connection of its own, one answer or stream.

Standard library only, and nothing of a request is tidied up on its way: a path is sent as it is.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from circuit_breakers.errors import ConfigError, RemoteServerError

__all__ = ["Answer", "RefusedError", "RemoteServer"]

_MAX_TRIES = 8
_MAX_PAUSE_S = 60
_TIMEOUT_S = 600
_BUSY = (429, 503)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    retry_after: str | None = None

    @property
    def json(self) -> Any:
        """The body as JSON; None where it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def fields(self) -> dict[str, Any]:
        """The body as an object, empty where it is none."""
        body = self.json
        return body if isinstance(body, dict) else {}

    @property
    def error(self) -> Mapping[str, Any]:
        """The error object, empty where there is none; a proxy's may be text."""
        error = self.fields.get("error")
        return error if isinstance(error, dict) else {}

    @property
    def code(self) -> Any:
        """Code of the error."""
        return self.error.get("code")

    @property
    def reason(self) -> str:
        """What the error says."""
        return str(self.error.get("message", "no reason"))


class RefusedError(RemoteServerError):
    """The server answers with an error."""

    def __init__(self, place: str, answer: Answer) -> None:
        super().__init__(f"got HTTP {answer.status} from {place}: {answer.reason}")
        self.answer = answer


@dataclass(frozen=True)
class RemoteServer:
    """Where the routes are, and the key that opens them. Of use in several threads at once."""

    url: str = field(repr=False)
    """With or without /v1."""
    api_key: str | None = field(default=None, repr=False)
    option: str = "--url"
    """Where the user said so, for messages."""

    def __post_init__(self) -> None:
        """Checks the URL.

        Raises:
            ConfigError: it is none.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"got {self.option} {self.url!r}, expected one such as http://127.0.0.1:8000"
            )

    @property
    def place(self) -> str:
        """Host and port, without what a URL may hold of a password."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def base_url(self) -> str:
        """What the routes' paths come behind."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{self.place}{self._prefix}"

    @property
    def _prefix(self) -> str:
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """The answer to one request, whatever its status; sent once.

        Args:
            body: sent as JSON; None for no body.
        Raises:
            RemoteServerError: there is no answer.
        """
        with self._opened(method, path, body) as response, self._reported():
            return self._read(response)

    def ask_patiently(self, method: str, path: str, body: Any = None) -> Answer:
        """The same, asked again while a limit turns it away.

        Raises:
            RemoteServerError: there is no answer.
        """
        answer = self.ask(method, path, body)
        for attempt in range(1, _MAX_TRIES):
            if answer.status not in _BUSY:
                break
            after = answer.retry_after
            # It may be a date, from a proxy.
            seconds = int(after) if after and after.isdecimal() else 2 ** (attempt - 1)
            time.sleep(min(seconds, _MAX_PAUSE_S))
            answer = self.ask(method, path, body)
        return answer

    def stream(self, path: str, body: Any) -> Generator[dict[str, Any], None, None]:
        """The events of the answer to a POST, each an object, up to its end.

        Raises:
            RefusedError: while iterating; the status is not 200.
            RemoteServerError: while iterating; there is no answer, or it breaks off.
        """
        with self._opened("POST", path, body) as response:
            if response.status != 200:
                with self._reported():
                    raise RefusedError(self.place, self._read(response))
            while True:
                with self._reported():
                    line = response.readline()
                    field, _, data = line.strip().partition(b":")
                    if field != b"data":
                        event = None
                    elif data.strip() == b"[DONE]":
                        return
                    else:
                        event = json.loads(data)
                if not line:
                    raise RemoteServerError(f"{self.place}: the answer broke off; ask again")
                if event is not None:
                    yield event

    @contextmanager
    def _opened(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        secure = urlsplit(self.url).scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        connection = kind(self.place, timeout=_TIMEOUT_S)
        try:
            with self._reported():
                sent = None if body is None else json.dumps(body).encode()
                connection.request(method, self._prefix + path, sent, headers)
                response = connection.getresponse()
            yield response
        finally:
            connection.close()

    @staticmethod
    def _read(response: http.client.HTTPResponse) -> Answer:
        return Answer(
            status=response.status,
            body=response.read(),
            retry_after=response.getheader("Retry-After"),
        )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise RemoteServerError(
                f"{self.place} does not answer ({type(e).__name__}); check {self.option}, and that "
                "the server is ready"
            ) from e
