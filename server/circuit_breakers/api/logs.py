"""Logging of the server's processes, as text or as one JSON object a line.

The API process takes `configure_logging`; vLLM's logger, there and in the engine's processes, takes
engine_logging.json, which leads back here. No record of this package holds text of a prompt or an
answer; a traceback has no message of another's exception, which may quote one.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from circuit_breakers.api.request_summary import RequestSummary
from circuit_breakers.errors import CircuitBreakersError
from circuit_breakers.settings import ServeSettings

__all__ = [
    "ENGINE_CONFIG",
    "JsonFormatter",
    "TextFormatter",
    "access_logger",
    "configure_logging",
    "engine_handler",
    "log_request",
]

ENGINE_CONFIG = Path(__file__).with_name("engine_logging.json")
"""For VLLM_LOGGING_CONFIG_PATH."""
_STDERR_FD = 2
_MAX_CAUSES = 8

access_logger = logging.getLogger("circuit_breakers.access")
"""Shown in JSON at any level, in text from --log-level info on."""


class _WordlessFormatter(logging.Formatter):
    """Tracebacks without the messages of exceptions that are not ours."""

    def formatException(self, ei: Any) -> str:
        parts: list[str] = []
        error: BaseException | None = ei[1]
        while error is not None and len(parts) < _MAX_CAUSES:
            said = f": {error}" if isinstance(error, CircuitBreakersError) else ""
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"Traceback:\n{frames}{type(error).__name__}{said}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\nafter:\n".join(parts)


class TextFormatter(_WordlessFormatter):
    """`LEVEL logger: message`, then the record's fields."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(_WordlessFormatter):
    """One object a line: time, level, logger, message, process, the record's fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(settings: ServeSettings) -> None:
    """Sets this process's logging up, and by variables that of vLLM and of its processes."""
    is_json = settings.log_format == "json"
    handler = _json_handler() if is_json else _text_handler()
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", settings.log_level.upper())
    # Standard output is for the ready line.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if is_json:
        _show_requests()
        logging.captureWarnings(True)
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(ENGINE_CONFIG))


def engine_handler() -> logging.Handler:
    """What engine_logging.json asks for; gives vLLM's logger its level, which no file can know."""
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    _show_requests()
    return _json_handler()


def log_request(summary: RequestSummary) -> None:
    """The access log's line of a request that has ended."""
    if access_logger.isEnabledFor(logging.INFO):
        access_logger.info("request ended", extra={"fields": summary.to_json()})


def _show_requests() -> None:
    # Whoever collects lines wants one for each request; in text they come with --log-level info.
    access_logger.setLevel(min(logging.INFO, logging.getLogger().level))


def _json_handler() -> logging.Handler:
    # A stream of its own: vLLM may put a prefix into what its processes write to sys.stderr.
    stream = os.fdopen(os.dup(_STDERR_FD), "w", buffering=1, errors="backslashreplace")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    return handler


def _text_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter())
    return handler


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields
