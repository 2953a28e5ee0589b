"""From settings to a server that answers, and back down again.

    bind the port -> answer /livez -> model, breaker, memory -> engine -> canaries -> ready
    SIGHUP -> policy file again
    SIGTERM -> not ready -> drain delay -> refuse new requests, let running ones end -> stop
    second SIGTERM -> stop at once
    engine dies -> requests end with an error -> exit 1, for whatever restarts a server

The port is bound first: a taken one fails at once, and probes are answered while the model loads.
Whatever fails on the way ends the process with one message.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from types import FrameType
from typing import Any, NoReturn

import psutil
from prometheus_client import REGISTRY

from circuit_breakers.api.app import create_app
from circuit_breakers.api.connection import http_server
from circuit_breakers.api.logs import configure_logging
from circuit_breakers.api.preflight import (
    available_memory_bytes,
    bind,
    check_memory,
    memory_need,
)
from circuit_breakers.api.refusals import shutting_down
from circuit_breakers.api.service import Service, reload_on_hangup
from circuit_breakers.api.tracing import open_tracer
from circuit_breakers.api.trail import open_trail
from circuit_breakers.artifact import Breaker, builtin_breaker_path, load_breaker
from circuit_breakers.errors import ConfigError, NotReadyError
from circuit_breakers.guard.operating_point import probes_at
from circuit_breakers.guard.policy import Policy
from circuit_breakers.models import ResolvedModel, resolve_model
from circuit_breakers.settings import ServeSettings

__all__ = ["load_parts", "serve"]

logger = logging.getLogger(__name__)

_HEAVY_MODULES = (
    "vllm.v1.engine.async_llm",
    "circuit_breakers.engine.launch",
    "circuit_breakers.api.serving",
)
"""Imported off the event loop, which keeps answering probes."""
_STOP_S = 5.0
"""Of the shutdown time: for the last events of streams, and for the engine to stop."""
_DEATH_POLL_S = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Runs the server until SIGTERM or SIGINT.

    Args:
        say: prints a line for people, such as the one that says how to try the server.
    Raises:
        CircuitBreakersError: the server cannot start; the message says the cure.
    """
    configure_logging(settings)
    listener = bind(settings.host, settings.port)
    # A thread, since the engine's shutdown blocks the event loop.
    deadline = threading.Timer(settings.shutdown_timeout_s, _end_in_time)
    deadline.daemon = True
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, listener, say, deadline))
    finally:
        deadline.cancel()


def load_parts(settings: ServeSettings) -> tuple[ResolvedModel, Breaker]:
    """Model and breaker, each verified, and fitting each other.

    Raises:
        CircuitBreakersError: one is missing or broken, they do not belong together, or the
            breaker's data does not support the promise that was asked for.
    """
    model = resolve_model(settings.model, revision=settings.revision)
    path = settings.breaker or builtin_breaker_path(model.name)
    if path is None:
        raise ConfigError(
            f"no breaker ships for model {model.name!r}; pass --breaker DIR, or make one with "
            f"`circuit-breakers train --model {settings.model} --out DIR`"
        )
    breaker = load_breaker(path)
    breaker.check_fits(model.spec())
    # Said now, not after the minute that the engine takes.
    probes_at(breaker.manifest, settings.target_fpr)
    return model, breaker


async def _serve(
    settings: ServeSettings,
    listener: socket.socket,
    say: Callable[[str], None],
    deadline: threading.Timer,
) -> None:
    app = create_app(settings, REGISTRY)
    service: Service = app.state.service
    service.trail = open_trail(settings, service.metrics)
    service.tracer = open_tracer(settings)
    server = http_server(app, timeout_s=settings.body_timeout_s)
    stop = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, _stop, stop)
    reload_on_hangup(service)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    dying = asyncio.create_task(_death(service))
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(_start(service, settings, stack))
        try:
            await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                # A thread that reads a large checkpoint cannot be cancelled, and holds up the end.
                deadline.start()
                await _give_up(starting)
            else:
                await starting
                engine = _children()
                say(_ready_lines(service, listener))
                await asyncio.wait({stopping, serving, dying}, return_when=asyncio.FIRST_COMPLETED)
                service.leave()
                if dying.done() and not stop.is_set():
                    await _bury(service, engine)
                await asyncio.sleep(settings.drain_delay_s)
                deadline.start()
                await _drain(service)
        finally:
            service.wait_for("shutting down")
            server.should_exit = True
            await serving
            await asyncio.to_thread(service.trail.close)
            if service.tracer is not None:
                await asyncio.to_thread(service.tracer.close)
            stopping.cancel()
            dying.cancel()


async def _death(service: Service) -> None:
    """Returns when the engine has died."""
    while not service.dead:
        await asyncio.sleep(_DEATH_POLL_S)


async def _bury(service: Service, engine: Sequence[psutil.Process]) -> NoReturn:
    """Waits for the requests of a dead engine, which end with an error.

    Args:
        engine: its processes when it was ready; those of a dead one are no children any more.
    Raises:
        NotReadyError: always.
    """
    # Whatever hangs then, whoever restarts a server gets to do so.
    last_resort = threading.Timer(service.settings.shutdown_timeout_s, _end, (1,))
    last_resort.daemon = True
    last_resort.start()
    # One of them may still run, and hold the end up or the memory that the next start needs.
    _kill([*engine, *_children()])
    await _drain(service)
    raise NotReadyError(
        "the engine died, expected it to run until the server is stopped; see the log above for "
        "its own last words, or the kernel's where it ran out of memory, and start the server again"
    )


async def _drain(service: Service) -> None:
    """Returns when no request is left, at the latest when the time for them is over."""
    admission = service.admission
    # The port stays open: who comes now is told to go elsewhere.
    admission.close()
    try:
        async with asyncio.timeout(max(0.0, service.settings.shutdown_timeout_s - _STOP_S)):
            await admission.empty()
    except TimeoutError:
        logger.warning("ending %d requests that outlast the shutdown", admission.num_inside)
        admission.end_all(shutting_down())


def _stop(stop: asyncio.Event) -> None:
    stop.set()
    for number in _SIGNALS:
        # From now on past the event loop, which the engine's shutdown blocks.
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    _end(128 + number)


def _end_in_time() -> NoReturn:
    # All requests have been answered, to their end or with an error.
    logger.warning("ending the engine, which outlasts the shutdown")
    _end(0)


def _end(exit_code: int) -> NoReturn:
    """Ends the processes of the engine and this one, whatever they are doing."""
    _kill(_children())
    os._exit(exit_code)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # or another one has its number by now
            process.kill()


def _children() -> list[psutil.Process]:
    """All but the one that removes the shared memory of the others, and ends by itself."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


async def _start(service: Service, settings: ServeSettings, stack: AsyncExitStack) -> None:
    service.wait_for("loading the model and the breaker")
    model, breaker = await asyncio.to_thread(load_parts, settings)
    own = Policy.from_manifest(breaker.manifest, settings.mode, settings.target_fpr)
    service.governance.check(breaker.manifest, own)
    service.wait_for("loading vLLM")
    for module in _HEAVY_MODULES:
        await asyncio.to_thread(importlib.import_module, module)
    # Deferred: these pull in torch and vLLM.
    from circuit_breakers.api.canary import run_canaries, watched
    from circuit_breakers.api.serving import check_tool_call_parser, start_serving
    from circuit_breakers.engine.launch import EngineSettings, launch_engine

    check_tool_call_parser(settings.tool_call_parser)
    if _runs_on_cpu():
        need = memory_need(model.path, kv_cache_gib=settings.kv_cache_gib, dtype=settings.dtype)
        check_memory(need, available_memory_bytes())
    service.wait_for("starting the engine")
    engine_settings = EngineSettings(
        served_name=service.settings.model_name,
        **settings.model_dump(include=set(EngineSettings.model_fields) - {"served_name"}),
    )
    guarded = await stack.enter_async_context(launch_engine(engine_settings, model, breaker))
    serving = await start_serving(guarded, settings.tool_call_parser)
    service.wait_for("running the canaries")
    await run_canaries(service, serving)
    service.attach(serving)
    service.ready()
    await stack.enter_async_context(watched(service, serving))


async def _give_up(starting: asyncio.Task[None]) -> None:
    """Ends a start that is under way; what it raises is only the consequence."""
    # The thread that waits for the engine core cannot be cancelled; without the core it fails.
    for child in psutil.Process().children(recursive=True):
        child.terminate()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)


def _runs_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _ready_lines(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (only shown)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    breaker = service.serving().guarded.breaker
    policy = service.governance.book.default.policy
    wants_key = " -H 'Authorization: Bearer KEY'" if service.governance.rules.keys else ""
    name = service.settings.model_name
    question = "What is the capital of France?"
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 32,
    }
    console = service.governance.rules.console
    console_line = f"console: {url}/console  key: {console.tell()}\n" if console else ""
    return (
        f"ready: {name} on {url}, breaker {breaker.manifest.name} "
        f"{breaker.digest[:12]}, mode {policy.mode}\n"
        f"{console_line}"
        f"try:   curl {url}/v1/chat/completions{wants_key} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
