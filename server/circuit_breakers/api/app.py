"""The FastAPI app: a closed list of routes. What is not listed here does not exist.

    POST /v1/chat/completions   POST /v1/completions   POST /v1/responses   POST /v1/messages
    POST /v1/moderations   GET /v1/models   GET /v1/models/NAME   GET /v1/breaker
    POST /v1/breaker/reload   GET /v1/breaker/trips   GET /v1/breaker/what-if (for operators)
    GET /metrics   GET /livez   GET /readyz   GET /openapi.json   GET /console and its files

Every route that generates or scores goes through `complete` (completions.py): what holds for all
of them is done there.

Importing this module is light: vLLM's serving classes come with the engine.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from circuit_breakers.api.access import OPEN_PATHS, AccessGate, Caller, authenticate, require_admin
from circuit_breakers.api.admin import add_admin_routes
from circuit_breakers.api.completions import complete
from circuit_breakers.api.console import CONSOLE_PATHS, add_console
from circuit_breakers.api.describe import breaker_json, model_json, models_json
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.exact_path import ExactPath
from circuit_breakers.api.governed_route import GovernedRoute
from circuit_breakers.api.openapi import describe, generating, probing, reading
from circuit_breakers.api.service import Service, service_of
from circuit_breakers.errors import ConfigError
from circuit_breakers.settings import ServeSettings

if TYPE_CHECKING:
    from circuit_breakers.api.serving import Serving

__all__ = ["add_guarded_routes", "create_app"]

logger = logging.getLogger(__name__)


def create_app(
    settings: ServeSettings, registry: CollectorRegistry, serving: Serving | None = None
) -> FastAPI:
    """The app of one server process; its state is `app.state.service`.

    Args:
        serving: the serving classes of a live engine; without them every route that needs one
            answers 503 until `app.state.service` gets them.
    """
    app = FastAPI(title="Circuit Breakers", docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(settings, registry)
    app.state.service = service
    if serving is not None:
        service.attach(serving)
        service.ready()
    add_guarded_routes(app)
    _add_probes(app)
    _add_error_handlers(app)
    describe(app)
    app.add_middleware(AccessGate, service=service, open_paths=OPEN_PATHS | CONSOLE_PATHS)
    app.add_middleware(ExactPath)
    return app


def add_guarded_routes(app: FastAPI) -> None:
    """Adds the routes that every guarded server has, and the answer to their errors."""
    governed = APIRouter(route_class=GovernedRoute)

    @governed.post(**generating("chat", "/v1/chat/completions", "createChatCompletion", "Chat."))
    async def chat_completions(request: Request) -> Response:
        return await complete("chat", request)

    @governed.post(
        **generating("completion", "/v1/completions", "createCompletion", "Continue a text.")
    )
    async def completions(request: Request) -> Response:
        return await complete("completion", request)

    @governed.post(**generating("response", "/v1/responses", "createResponse", "Respond."))
    async def responses(request: Request) -> Response:
        return await complete("response", request)

    @governed.post(**generating("message", "/v1/messages", "createMessage", "Anthropic's chat."))
    async def messages(request: Request) -> Response:
        return await complete("message", request)

    @governed.post(**generating(None, "/v1/moderations", "createModeration", "Score texts."))
    async def moderations(request: Request) -> Response:
        return await complete("moderation", request)

    app.include_router(governed)

    @app.get(**reading("/v1/breaker", "getBreaker", "The breaker, and what it promises."))
    async def breaker(request: Request) -> JSONResponse:
        serving = service_of(request).serving()
        return JSONResponse(breaker_json(serving, authenticate(request)))

    @app.post(**reading("/v1/breaker/reload", "reloadPolicies", "Read the policy file again."))
    async def reload(
        request: Request, caller: Annotated[Caller, Depends(require_admin)]
    ) -> JSONResponse:
        try:
            return JSONResponse(service_of(request).reload_policies(caller.key_id))
        except ConfigError as e:
            raise ApiError(
                400, f"{e}; the old policies stay in force", code="invalid_policy_file"
            ) from e

    add_admin_routes(app)
    _add_models(app)
    add_console(app)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.to_response(anthropic=request.url.path == "/v1/messages")


def _add_models(app: FastAPI) -> None:
    @app.get(**reading("/v1/models", "listModels", "The served model, and its LoRAs."))
    async def models(request: Request) -> JSONResponse:
        serving = service_of(request).serving()
        return JSONResponse(models_json(serving, authenticate(request)))

    @app.get(**reading("/v1/models/{model:path}", "retrieveModel", "One of the models.", "model"))
    async def model(request: Request) -> JSONResponse:
        # With slashes: names from the hub have one.
        name = request.path_params["model"]
        return JSONResponse(model_json(service_of(request).serving(), authenticate(request), name))


def _add_probes(app: FastAPI) -> None:
    @app.get(**probing("/metrics", "getMetrics", "Prometheus series, vLLM's included."))
    async def metrics(request: Request) -> Response:
        return Response(
            generate_latest(service_of(request).registry), media_type=CONTENT_TYPE_LATEST
        )

    @app.get(**probing("/livez", "getLiveness", "Whether a restart would help."))
    async def livez(request: Request) -> JSONResponse:
        if service_of(request).dead:
            return JSONResponse({"status": "dead"}, status_code=503)
        return JSONResponse({"status": "live"})

    @app.get(**probing("/readyz", "getReadiness", "Whether requests are served."))
    async def readyz(request: Request) -> JSONResponse:
        reason = service_of(request).reason
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        code = "unknown_route" if error.status_code in (404, 405) else None
        return ApiError(error.status_code, message, code=code, headers=error.headers).to_response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The message could hold text of the prompt; the log has the traceback.
        logger.error("unexpected error: path=%s type=%s", request.url.path, type(error).__name__)
        return ApiError(
            500,
            f"internal error ({type(error).__name__}); nothing of the answer was sent, try again",
            code="internal_error",
        ).to_response()
