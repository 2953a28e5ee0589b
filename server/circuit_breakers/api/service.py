"""What the routes share: settings, metrics, the engine once it is there, and readiness."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request
from prometheus_client import CollectorRegistry

from circuit_breakers.api.accounting import RequestRecord
from circuit_breakers.api.admission import Admission, Limits
from circuit_breakers.api.errors import engine_dead, not_ready
from circuit_breakers.api.governance import Governance
from circuit_breakers.api.logs import log_request
from circuit_breakers.api.trail import SERVER_KEY_ID, AuditTrail
from circuit_breakers.errors import ConfigError
from circuit_breakers.metrics import GuardMetrics, HealthMetrics, LoadMetrics
from circuit_breakers.settings import ServeSettings

if TYPE_CHECKING:
    from circuit_breakers.api.request_summary import RequestSummary
    from circuit_breakers.api.serving import Serving
    from circuit_breakers.api.tracing import RequestTracer

__all__ = ["Service", "reload_on_hangup", "service_of"]


_TRACE_HEADERS = ("traceparent",)
"""W3C Trace Context; a tracestate may hold any text of the caller's."""


class Service:
    """State of one server process, from loading to ready."""

    def __init__(self, settings: ServeSettings, registry: CollectorRegistry) -> None:
        """Starts without an engine.

        Raises:
            ConfigError: the policy file does not fit.
        """
        self.settings = settings
        self.governance = Governance(settings)
        self.registry = registry
        self.metrics = GuardMetrics(registry, model=settings.model_name)
        self.trail = AuditTrail()
        """Way into the audit log; replaced before `attach` where one is kept."""
        self.tracer: RequestTracer | None = None
        """Where spans go; set before `attach` where they are wanted."""
        self.admission = Admission(
            max_concurrent=settings.max_concurrent_requests,
            max_queued=settings.max_queued_requests,
        )
        self.limits = Limits.from_settings(settings)
        self.load_metrics = LoadMetrics(
            registry,
            num_running=lambda: self.admission.num_running,
            num_waiting=lambda: self.admission.num_waiting,
        )
        self.health_metrics = HealthMetrics(
            registry,
            is_ready=lambda: self.reason is None,
            canary_interval_s=settings.canary_interval_s,
        )
        self.failed_canary: str | None = None
        """What a canary got instead of its verdict; not ready and nothing served until they pass
        again."""
        self._serving: Serving | None = None
        self._waiting_for: str | None = "starting"
        self._is_leaving = False

    def wait_for(self, what: str) -> None:
        """Names the step of the start that is under way; not ready until it is done."""
        self._waiting_for = what

    def attach(self, serving: Serving) -> None:
        """Takes the engine in; requests are still refused.

        Raises:
            ConfigError: a policy of the file does not fit its breaker.
        """
        self._serving = serving
        breaker = serving.guarded.breaker
        self.governance.attach(breaker.manifest, serving.guarded.policy)
        self._describe(serving)
        mode = self.governance.book.default.policy.mode
        self.trail.begin(breaker.digest, f"breaker {breaker.manifest.name}, mode {mode}")

    def reload_policies(self, key_id: str = SERVER_KEY_ID) -> dict[str, Any]:
        """Reads the policy file again and puts it in force; what is in force afterwards.

        Args:
            key_id: who asked for it.
        Raises:
            ConfigError: it does not fit; the old one stays in force.
        """
        try:
            in_force = self.governance.reload()
        except ConfigError:
            self.trail.record_admin("reload refused", key_id=key_id)
            raise
        if self._serving is not None:
            self._describe(self._serving)
        self.trail.record_admin("reload", key_id=key_id, detail=f"sha256 {in_force['digest']}")
        return in_force

    def _describe(self, serving: Serving) -> None:
        """Tells the metrics what is in force."""
        breaker, book = serving.guarded.breaker, self.governance.book
        default = book.default.policy
        self.metrics.describe_breaker(breaker.manifest, breaker.digest, default.name, default.mode)
        self.metrics.describe_policies(book.policies)

    def ready(self) -> None:
        """Opens the routes that need the engine."""
        assert self._serving is not None, "attach() comes first"
        self._waiting_for = None

    def new_record(self, headers: Mapping[str, str]) -> RequestRecord:
        """The entry that one completion request makes when it ends.

        Args:
            headers: of the request.
        """
        listeners: list[Callable[[RequestSummary], None]] = [log_request]
        if self.tracer is not None:
            listeners.append(self.tracer.record)
        return RequestRecord(
            self.metrics,
            self.trail,
            model=self.settings.model_name,
            listeners=listeners,
            trace_headers={name: headers[name] for name in _TRACE_HEADERS if name in headers},
        )

    def leave(self) -> None:
        """Not ready from now on, for load balancers; requests are still served."""
        self._is_leaving = True

    @property
    def dead(self) -> bool:
        """The engine was there and died; only a restart helps."""
        return self._serving is not None and bool(self._serving.guarded.errored)

    @property
    def reason(self) -> str | None:
        """Why no request should be sent here; None when they may."""
        if self.dead:
            return "the engine died and the server ends"
        if self._is_leaving:
            return "shutting down"
        return self._waiting_for or self.failed_canary

    @property
    def attached(self) -> Serving | None:
        """The serving classes once they are there, whether or not requests are served."""
        return self._serving

    def serving(self) -> Serving:
        """The serving classes around the live engine.

        Raises:
            ApiError: 503 until the server is ready, and again when the engine has died.
        """
        if self.dead:
            raise engine_dead()
        if self._waiting_for is not None:
            raise not_ready(self._waiting_for)
        if self.failed_canary is not None:
            raise not_ready(self.failed_canary)
        assert self._serving is not None, "ready() needs it"
        return self._serving


def reload_on_hangup(service: Service) -> None:
    """Makes SIGHUP read the policy file again; without one it ends the process, as ever."""

    def reload() -> None:
        # What is wrong with the file is in the log by then.
        with suppress(ConfigError):
            service.reload_policies()

    if service.governance.has_file:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
