"""The guard in vLLM's own API server: an endpoint plugin that closes its list of routes.

    ours, in the place of vLLM's     POST /v1/chat/completions   POST /v1/completions
                                     POST /v1/responses          POST /v1/messages
                                     GET /v1/models
    ours, new                        POST /v1/moderations        GET /v1/breaker
                                     GET /v1/models/NAME
                                     GET /v1/breaker/trips       GET /v1/breaker/what-if
                                     POST /v1/breaker/reload     GET /console and its files
    vLLM's, on the guarded engine    POST /v1/chat/completions/batch (batch_route.py)
    vLLM's, without generation       tokenize, health, metrics, documentation
    everything else                  404

vLLM builds its serving classes on the bare engine client, then asks its plugins for their state.
There they are built once more, on the GuardedEngine. The server listens after that, so the probes'
digests are checked and the canaries have run before the first request.
"""

from __future__ import annotations

import asyncio
import atexit
import re
from argparse import Namespace
from os import environ
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from circuit_breakers.api.access import AccessGate
from circuit_breakers.api.admin import ADMIN_ROUTES
from circuit_breakers.api.app import add_guarded_routes
from circuit_breakers.api.batch_route import BatchRoute
from circuit_breakers.api.console import CONSOLE_PATHS
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.logs import ENGINE_CONFIG
from circuit_breakers.api.openapi import describe
from circuit_breakers.api.service import Service, reload_on_hangup
from circuit_breakers.api.tracing import open_tracer
from circuit_breakers.api.trail import open_trail
from circuit_breakers.engine import dropin
from circuit_breakers.engine.breaker_request import is_requested
from circuit_breakers.engine.config import EngineGuardConfig
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.errors import ConfigError, NotReadyError
from circuit_breakers.settings import ServeSettings, load_settings

__all__ = ["EndpointPlugin", "RouteGate"]

_OWN = (
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses"),
    *("POST /v1/messages", "POST /v1/moderations", "GET /v1/breaker"),
    *("POST /v1/breaker/reload", *ADMIN_ROUTES, "GET /v1/models", "GET /v1/models/.+"),
    *(f"GET {re.escape(path)}" for path in sorted(CONSOLE_PATHS)),
)
_WITHOUT_KEY = frozenset({"/health", "/ping"})
_WITHOUT_GENERATION = (
    *("GET /health", "GET /ping", "POST /ping", "GET /load", "GET /version"),
    *("POST /tokenize", "POST /detokenize", "GET /tokenizer_info"),
    "POST /v1/messages/count_tokens",
    *("GET /metrics/?", "GET /openapi.json", "GET /docs", "GET /redoc", "GET /static/.*"),
)
_GENERATING = ("POST /v1/chat/completions/batch",)


def _pattern(routes: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(route.replace(".json", r"\.json") for route in routes))


class EndpointPlugin:
    """What vLLM's `vllm.endpoint_plugins` entry point makes. Without a breaker it does nothing."""

    name = dropin.ENDPOINT_PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds our routes and puts the gate in front of all others.

        Raises:
            ConfigError: an option of the server would let requests around the guard.
            UnsupportedEngineError: one of vLLM's switches would.
        """
        args = app.state.args
        if not is_requested(args.additional_config, environ):
            return
        dropin.check_environment()
        _check_server_arguments(args)
        name = (args.served_model_name or [args.model])[0]
        app.state.service = service = Service(load_settings(served_name=name), REGISTRY)
        _check_settings(service.settings)
        service.trail = open_trail(service.settings, service.metrics)
        service.tracer = open_tracer(service.settings)
        # vLLM tells its plugins nothing of the end.
        atexit.register(service.trail.close)
        if service.tracer is not None:
            atexit.register(service.tracer.close)
        add_guarded_routes(app)
        describe(app)
        app.add_middleware(RouteGate, service=app.state.service)
        app.add_middleware(
            AccessGate, service=app.state.service, open_paths=_WITHOUT_KEY | CONSOLE_PATHS
        )

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Builds vLLM's serving classes on the guarded engine, and proves the guard live.

        Raises:
            NotReadyError: a worker has no probes, or a canary gets another verdict than its label.
            ConfigError: another endpoint plugin holds the bare engine client.
        """
        service: Service | None = getattr(state, "service", None)
        # The second call comes from building the state anew.
        if service is None or engine_client is None or isinstance(engine_client, GuardedEngine):
            return
        if others := [p.name for p in state.endpoint_plugins if p is not self]:
            raise ConfigError(
                f"got endpoint plugins {', '.join(others)} next to a breaker, expected none: they "
                "hold the engine without its guard; take them out of VLLM_PLUGINS"
            )
        # Deferred: only a server with a breaker pays for them.
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state

        from circuit_breakers.api.canary import run_canaries, watch_canaries
        from circuit_breakers.api.serving import Serving
        from circuit_breakers.engine.launch import guarded_engine

        config = EngineGuardConfig.from_vllm_config(engine_client.vllm_config)
        if config is None:
            raise NotReadyError(
                "the engine runs without the breaker that is configured, expected it inside; is "
                "the plugin 'circuit_breakers' broken? See the log from its load on"
            )
        breaker = config.load_breaker()
        guarded = await guarded_engine(
            engine_client,
            breaker,
            config.mode,
            config.adapter,
            args,
            target_fpr=config.target_fpr,
        )
        await init_app_state(guarded, state, args, await guarded.get_supported_tasks())
        serving = Serving(guarded, state)
        await run_canaries(service, serving)
        service.attach(serving)
        reload_on_hangup(service)
        service.ready()
        # Kept, as the event loop alone would let go of it; ends with vLLM's own.
        state.canaries = asyncio.create_task(watch_canaries(service, serving))


def _check_settings(settings: ServeSettings) -> None:
    if settings.console:
        raise ConfigError(
            "got the setting console in vLLM's own server, which has no line to print its key in; "
            "leave it out, and give an admin key in the policy file"
        )
    if settings.log_format != "text":
        raise ConfigError(
            f"got log_format {settings.log_format!r} in vLLM's own server, which has set its "
            f"logging up by now; set VLLM_LOGGING_CONFIG_PATH to {ENGINE_CONFIG} instead"
        )


def _check_server_arguments(args: Namespace) -> None:
    off = {
        "lora_modules": "another adapter would change what the probes read",
        "trust_request_chat_template": "the breaker is calibrated on the model's own template",
        "tool_server": "its tools act before a later verdict",
        "enable_fault_tolerance": "its routes restart engines",
    }
    for name, why in off.items():
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"got {flag} next to a breaker, expected it left out: {why}; remove it"
            )


class RouteGate:
    """Lets the listed routes through and answers 404 to all others, whoever added them."""

    _open = _pattern(_OWN + _WITHOUT_GENERATION)
    _generating = _pattern(_GENERATING)

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._batch = BatchRoute(app, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(scope.get("root_path", "") or "")
        method = scope.get("method", "WEBSOCKET")
        route = f"{'GET' if method == 'HEAD' else method} {path}"
        if self._open.fullmatch(route):
            await self._app(scope, receive, send)
        elif self._generating.fullmatch(route):
            await self._batch(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = ApiError(
                404,
                f"{method} {path}: not served next to a breaker",
                code="unknown_route",
            )
            await error.to_response()(scope, receive, send)
