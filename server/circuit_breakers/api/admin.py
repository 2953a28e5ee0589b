"""Routes for operators: what has tripped, and what would have under other thresholds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from circuit_breakers.api.access import Caller, require_admin
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.logs import access_logger
from circuit_breakers.api.openapi import reading
from circuit_breakers.api.service import service_of
from circuit_breakers.audit.entry import days_ago_us
from circuit_breakers.audit.whatif import CAVEATS, what_if
from circuit_breakers.errors import AuditError, CalibrationError
from circuit_breakers.guard.decision import Phase
from circuit_breakers.guard.operating_point import probes_at

if TYPE_CHECKING:
    from circuit_breakers.audit.store import AuditStore
    from circuit_breakers.audit.writer import AuditWriter

__all__ = ["ADMIN_ROUTES", "TripQuery", "WhatIfQuery", "add_admin_routes"]

ADMIN_ROUTES = ("GET /v1/breaker/trips", "GET /v1/breaker/what-if")

_MAX_TRACES = 50_000
"""Traces that one answer is worked out from, the newest: a second's work beside live streams."""
_MAX_LOGIT = 1e30

Q = TypeVar("Q", bound=BaseModel)
T = TypeVar("T")
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
"""PostgreSQL has no text with a NUL."""


class TripQuery(BaseModel):
    """What GET /v1/breaker/trips can be asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: Annotated[int, Field(ge=1, le=500)] = 50
    """Trips on one page."""
    cursor: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """`next_cursor` of the page before."""
    since: AwareDatetime | None = None
    """ISO 8601 with its offset, e.g. 2026-01-31T00:00:00Z; included."""
    until: AwareDatetime | None = None
    """Excluded."""
    key: Text | None = None
    """Public id of an API key."""
    policy: Text | None = None
    phase: Phase | None = None
    probe: Text | None = None


class WhatIfQuery(BaseModel):
    """What GET /v1/breaker/what-if can be asked: exactly one of threshold and target_fpr."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[float, Field(gt=-_MAX_LOGIT, lt=_MAX_LOGIT)] | None = None
    """Threshold of every probe, a logit."""
    target_fpr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """As in serve --target-fpr: thresholds that the breaker's calibration proves it for."""
    days: Annotated[int, Field(ge=1, le=3650)] = 7
    """How far back."""


def add_admin_routes(app: FastAPI) -> None:
    """Adds the operators' routes; each refuses everybody else."""

    @app.get(**_querying("/v1/breaker/trips", "listTrips", "What has tripped.", TripQuery))
    async def trips(
        request: Request, caller: Annotated[Caller, Depends(require_admin)]
    ) -> JSONResponse:
        query = _query(TripQuery, request)
        writer = _writer(request)
        _note(request, caller)
        return JSONResponse(await _off_the_loop(lambda: _trips_json(writer, query)))

    @app.get(
        **_querying("/v1/breaker/what-if", "getWhatIf", "Trips under other rules.", WhatIfQuery)
    )
    async def what_if_route(
        request: Request, caller: Annotated[Caller, Depends(require_admin)]
    ) -> JSONResponse:
        query = _query(WhatIfQuery, request)
        thresholds, breaker = _thresholds(request, query)
        if not service_of(request).trail.keeps_traces:
            raise ApiError(
                404,
                "this server keeps no score traces; start it with --score-traces",
                code="score_traces_off",
            )
        store = _writer(request).store
        _note(request, caller)
        return JSONResponse(
            await _off_the_loop(lambda: _what_if_json(store, query, thresholds, breaker))
        )


def _querying(path: str, operation: str, summary: str, query: type[BaseModel]) -> dict[str, Any]:
    return reading(path, operation, summary) | {"openapi_extra": _parameters(query)}


def _trips_json(writer: AuditWriter, query: TripQuery) -> dict[str, Any]:
    # Deferred, as everything that needs SQLAlchemy.
    from circuit_breakers.audit.store import TripFilter

    which = TripFilter(
        since_us=_us(query.since),
        until_us=_us(query.until),
        key_id=query.key,
        policy=query.policy,
        phase=query.phase,
        probe=query.probe,
    )
    page = writer.store.trips(which, before_seq=query.cursor, limit=query.limit)
    return {
        "object": "list",
        "data": [_trip_json(row) for row in page.rows],
        "has_more": page.next_seq is not None,
        "next_cursor": page.next_seq,
        "num_pending": writer.num_pending,
    }


def _trip_json(row: dict[str, Any]) -> dict[str, Any]:
    named = ("action", "request_id", "key_id", "model", "policy", "breaker", "phase", "probe")
    numbers = ("score", "threshold", "token_index", "choice")
    return {
        "object": "breaker.trip",
        "id": row["entry_id"],
        "sequence": row["seq"],
        "time": datetime.fromtimestamp(row["time_us"] / 1e6, UTC).isoformat(),
        **{name: row[name] for name in named + numbers},
    }


def _what_if_json(
    store: AuditStore, query: WhatIfQuery, thresholds: dict[str, float], breaker: str
) -> dict[str, Any]:
    since_us = days_ago_us(query.days)
    traces = list(store.traces(since_us, breaker=breaker, limit=_MAX_TRACES + 1))
    newest = traces[:_MAX_TRACES]
    return {
        "object": "breaker.what_if",
        "breaker": breaker,
        "days": query.days,
        "since": datetime.fromtimestamp(
            (newest[-1].time_us if len(traces) > _MAX_TRACES else since_us) / 1e6, UTC
        ).isoformat(),
        "is_complete": len(traces) <= _MAX_TRACES,
        "thresholds": thresholds,
        "data": [group.to_json() for group in what_if(newest, thresholds)],
        "notes": list(CAVEATS),
    }


def _thresholds(request: Request, query: WhatIfQuery) -> tuple[dict[str, float], str]:
    """Threshold by probe, and the digest of the breaker that they are for."""
    breaker = service_of(request).serving().guarded.breaker
    if (query.threshold is None) == (query.target_fpr is None):
        raise ApiError(
            400, "give exactly one of 'threshold' and 'target_fpr'", code="invalid_value"
        )
    if query.threshold is not None:
        return {p.name: query.threshold for p in breaker.manifest.probes}, breaker.digest
    try:
        probes = probes_at(breaker.manifest, query.target_fpr)
    except CalibrationError as e:
        raise ApiError(400, str(e), code="invalid_value", param="target_fpr") from e
    return {p.name: p.threshold_logit for p in probes}, breaker.digest


def _note(request: Request, caller: Caller) -> None:
    # Not into the log that is read: a console that polls would fill it with its own reading.
    access_logger.info("admin read: path=%s key_id=%s", request.url.path, caller.key_id)


def _writer(request: Request) -> AuditWriter:
    writer = service_of(request).trail.writer
    if writer is None:
        raise ApiError(
            404,
            "this server keeps no audit log; start it with --audit-db or --audit-url",
            code="audit_log_off",
        )
    return writer


async def _off_the_loop(work: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(work)
    except AuditError as e:
        # Its message may say where the database is.
        raise ApiError(
            503,
            "the audit log's database does not answer; trips wait in the spool, try again later",
            code="audit_log_unavailable",
            headers={"Retry-After": "5"},
        ) from e


def _query(model: type[Q], request: Request) -> Q:
    """The query string, checked; an unknown name is refused, as it would filter nothing."""
    pairs = request.query_params.multi_items()
    names = [name for name, _ in pairs]
    try:
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ApiError(400, f"{repeated[0]!r} is given more than once", param=repeated[0])
        return model.model_validate(dict(pairs))
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        known = ", ".join(model.model_fields)
        raise ApiError(
            400,
            f"query parameter {name!r}: {problem['msg'].lower()}; expected {known}",
            code="invalid_value",
            param=name,
        ) from e


def _parameters(model: type[BaseModel]) -> dict[str, Any]:
    properties = model.model_json_schema(mode="validation")["properties"]
    place: Literal["query"] = "query"
    return {
        "parameters": [
            {"name": name, "in": place, "required": False, "schema": schema}
            for name, schema in properties.items()
        ]
    }


def _us(time: datetime | None) -> int | None:
    # Whole seconds and microseconds apart: a float would round.
    return None if time is None else int(time.timestamp()) * 1_000_000 + time.microsecond
