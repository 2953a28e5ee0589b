"""Who calls, what they may do, and which policy they run under.

    headers -> key -> Caller -> X-Breaker-Policy may tighten -> the route

`AccessGate` stands in front of all routes, so that a route that knows nothing of keys is behind
them too, and everything that it generates is judged by its caller's policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from circuit_breakers.api.errors import ApiError, not_ready
from circuit_breakers.api.governance import Governance, Rules
from circuit_breakers.api.service import Service, service_of
from circuit_breakers.engine.session import governed_by
from circuit_breakers.errors import PolicyRequestError
from circuit_breakers.guard.decision import Phase
from circuit_breakers.metrics import Refusal
from circuit_breakers.policies.limits import KeyLimits
from circuit_breakers.policies.policy_book import PolicyBook
from circuit_breakers.policies.policy_file import ANONYMOUS, KeySpec
from circuit_breakers.policies.served_policy import ServedPolicy
from circuit_breakers.policies.tightening import (
    GuardRequest,
    loosenings,
    parse_guard_request,
)

__all__ = [
    "GUARD_FIELD",
    "OPEN_PATHS",
    "POLICY_HEADER",
    "AccessGate",
    "Caller",
    "authenticate",
    "blocking",
    "check_model",
    "require_admin",
    "require_admin_for_scores",
    "take_guard_request",
    "tightened_by",
]

POLICY_HEADER = "X-Breaker-Policy"
"""Request header with the name of a policy to run under instead of the caller's own."""
GUARD_FIELD = "guard"
"""Request field that tightens: {policy, mode, target_fpr, threshold}; and {token_scores}."""

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""Those that orchestrators ask, which have no key."""

_KEY_HEADERS = ("api-key", "x-api-key")
_WITHOUT_INFERENCE = frozenset({"/v1/breaker", "/v1/models", "/metrics", "/openapi.json"})
_PREFIXES_WITHOUT_INFERENCE = ("/v1/breaker/", "/v1/models/")
_REFUSALS_BY_STATUS: dict[int, Refusal] = {401: "unauthenticated", 403: "forbidden"}
_STATE = "circuit_breakers_caller"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request; stays the same for it whatever is reloaded meanwhile."""

    key_id: str = ANONYMOUS
    is_admin: bool = False
    may_infer: bool = True
    models: frozenset[str] | None = None
    """Names that it may pass as `model`; None for all."""
    limits: KeyLimits | None = None
    book: PolicyBook | None = None
    """The policies in force when it called; None before the engine is there."""
    policy: ServedPolicy | None = None
    """What its requests run under; None before the engine is there."""

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


def authenticate(request: Request) -> Caller:
    """Who sent this request.

    Raises:
        ApiError: 401 without a valid key, where keys are wanted; 400 for a policy header that
            would loosen.
    """
    caller: Caller | None = getattr(request.state, _STATE, None)
    return caller or _authenticate(request, service_of(request).governance.rules)


def require_admin(request: Request) -> Caller:
    """Who sent this request, an admin.

    Raises:
        ApiError: 401 without a valid key, 403 with one that has no admin scope.
    """
    caller = authenticate(request)
    if caller.is_admin:
        return caller
    raise _forbidden(request, f"{request.method} {request.url.path} needs an admin key; ")


def require_admin_for_scores(request: Request, caller: Caller) -> None:
    """Passes when a caller may have the scores of single tokens.

    Raises:
        ApiError: 403.
    """
    if not caller.is_admin:
        raise _forbidden(
            request,
            "got guard.token_scores without an admin key, expected one, since they show which "
            "words get past the guard; leave it out, or ",
            param=f"{GUARD_FIELD}.token_scores",
        )


def _forbidden(request: Request, what: str, *, param: str | None = None) -> ApiError:
    service = service_of(request)
    service.load_metrics.record_refusal("forbidden")
    rules = service.governance.rules
    if rules.keys:
        cure = "send one whose scope has 'admin'"
    elif rules.console is not None:
        cure = "send the one that the server printed when it was ready"
    else:
        cure = (
            "give one in the policy file (--policies) with scope = ['admin'], or start the server "
            "with --console"
        )
    return ApiError(403, what + cure, code="insufficient_permissions", param=param)


def check_model(caller: Caller, model: str) -> None:
    """Passes when a caller may use a model.

    Raises:
        ApiError: 404, as if there were none of that name.
    """
    if not caller.may_use(model):
        raise ApiError(
            404,
            f"the model {model!r} does not exist or is not for this key; see /v1/models",
            code="model_not_found",
            param="model",
        )


def take_guard_request(data: dict[str, Any]) -> GuardRequest | None:
    """The `guard` field, taken out of the body; None where there is none.

    Raises:
        ApiError: 400, it does not fit.
    """
    value = data.pop(GUARD_FIELD, None)
    try:
        return None if value is None else parse_guard_request(value)
    except PolicyRequestError as e:
        raise _not_allowed(e) from e


def tightened_by(caller: Caller, asked: GuardRequest | None) -> ServedPolicy:
    """What a request runs under.

    Raises:
        ApiError: 400 for a field that would loosen, 503 before the engine is there.
    """
    if caller.policy is None or caller.book is None:
        raise not_ready("no policy is in force yet")
    if asked is None:
        return caller.policy
    try:
        return caller.book.tightened(caller.policy, asked)
    except PolicyRequestError as e:
        raise _not_allowed(e) from e


def _not_allowed(error: PolicyRequestError) -> ApiError:
    return ApiError(400, str(error), code="policy_not_allowed", param=GUARD_FIELD)


def blocking(served: ServedPolicy, phases: frozenset[Phase]) -> ServedPolicy:
    """`served`, enforced, with these phases judged too; as it is where none is asked for.

    Raises:
        ApiError: 400, judging them as well would loosen what is judged now.
    """
    if not phases:
        return served
    policy = replace(served.policy, mode="enforce", phases=served.policy.phases | phases)
    blocked = replace(served, policy=policy)
    if looser := loosenings(served, blocked):
        raise ApiError(
            400,
            f"moderation.policy: got mode 'block' where it would loosen policy {served.name!r}: "
            f"{'; '.join(looser)}; ask for 'score'",
            code="policy_not_allowed",
            param="moderation.policy",
        )
    return blocked


class AccessGate:
    """Lets a request in with its Caller, and makes what it generates run under its policy."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str]) -> None:
        """Stands in front of `app`.

        Args:
            open_paths: those that never want a key.
        """
        self._app = app
        self._governance: Governance = service.governance
        self._metrics = service.load_metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        rules = self._governance.rules
        # As the router sees it; any other spelling of an open path wants a key.
        path = str(scope["path"])
        if path in self._open_paths or (rules.metrics_are_open and path.rstrip("/") == "/metrics"):
            await self._app(scope, receive, send)
            return
        try:
            caller = _authenticate(HTTPConnection(scope), rules)
            if not caller.may_infer and not _is_without_inference(path):
                raise ApiError(
                    403,
                    f"key {caller.key_id!r} has no scope 'inference'; send one that has",
                    code="insufficient_permissions",
                )
        except ApiError as error:
            if (refusal := _REFUSALS_BY_STATUS.get(error.status)) is not None:
                self._metrics.record_refusal(refusal)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                answer = error.to_response(anthropic=path == "/v1/messages")
                await answer(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), _STATE: caller}
        with governed_by(caller.policy.policy if caller.policy else None):
            await self._app(scope, receive, send)


def _is_without_inference(path: str) -> bool:
    return path in _WITHOUT_INFERENCE or path.startswith(_PREFIXES_WITHOUT_INFERENCE)


def _authenticate(connection: HTTPConnection, rules: Rules) -> Caller:
    caller = _caller(_key_of(connection, rules), rules)
    asked = connection.headers.getlist(POLICY_HEADER)
    if rules.book is None:
        if asked or rules.file is not None:
            # Nobody runs under less than what they were given, not even at the start.
            raise not_ready("no policy is in force yet")
        return caller
    assert caller.policy is not None, "there is one as soon as there is a book"
    if not asked:
        return caller
    try:
        if len(asked) > 1:
            raise PolicyRequestError(f"got {len(asked)} headers {POLICY_HEADER}; send one")
        wanted = GuardRequest.model_construct(policy=asked[0], _fields_set={"policy"})
        return replace(caller, policy=rules.book.tightened(caller.policy, wanted))
    except PolicyRequestError as e:
        raise ApiError(400, str(e), code="policy_not_allowed", param=POLICY_HEADER) from e


def _caller(key: KeySpec | None, rules: Rules) -> Caller:
    policy = rules.book.of_key(key) if rules.book else None
    if key is None:
        return Caller(book=rules.book, policy=policy)
    return Caller(
        key_id=key.id,
        is_admin="admin" in key.scope,
        may_infer="inference" in key.scope,
        models=key.models,
        limits=key.limits,
        book=rules.book,
        policy=policy,
    )


def _key_of(connection: HTTPConnection, rules: Rules) -> KeySpec | None:
    """The key of a request; None where nobody needs one, and it does not show the console's.

    Raises:
        ApiError: 401, it needs one.
    """
    if rules.keys:
        return _key(connection, rules)
    if rules.console is None:
        return None
    try:
        return _key(connection, rules)
    except ApiError:
        # Clients send any key to a server that wants none.
        return None


def _key(connection: HTTPConnection, rules: Rules) -> KeySpec:
    """The key that a request shows.

    Raises:
        ApiError: 401, it shows none, several, an unknown one, or one past its time.
    """
    shown = _shown_keys(connection)
    if not shown:
        raise _unauthorized("got no API key; send one as 'Authorization: Bearer KEY'")
    if len(shown) > 1:
        raise _unauthorized("got several API keys; send one")
    key = rules.key_of(shown.pop())
    if key is None:
        raise _unauthorized("got an API key that the server does not know; send a valid one")
    if key.has_expired():
        raise _unauthorized("got an API key that has expired; ask the operator for a new one")
    return key


def _shown_keys(connection: HTTPConnection) -> set[str]:
    """Every key in the headers.

    Raises:
        ApiError: 401, one of them has another scheme.
    """
    shown = {value for name in _KEY_HEADERS for value in connection.headers.getlist(name)}
    for value in connection.headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized(
                "got an Authorization header that is no 'Bearer KEY'; send one that is"
            )
        shown.add(key.strip())
    return shown - {""}


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
