"""What every check is given: the server, the breaker that should be in it, and the test data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeVar

from rich.console import Console

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.errors import ConfigError, RemoteServerError
from circuit_breakers.remote_server import Answer, RemoteServer
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.evaluation.prompts import EvalPrompt, dataset_prompts
from circuit_breakers_training.gate.counters import Counters, read_counters
from circuit_breakers_training.gate.judging import Judge
from circuit_breakers_training.gate.rows import Bars, load_bars
from circuit_breakers_training.gate.settings import GateSettings
from circuit_breakers_training.work_dir import progress_bar

__all__ = ["ServedModel", "Target", "ask_each", "open_target"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_WORKERS: Final = 8
"""Requests at once."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server calls its model."""

    name: str
    max_tokens: int
    """Of prompt and answer."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server, the breaker and the data of one gate."""

    settings: GateSettings
    bars: Bars
    server: RemoteServer
    served: dict[str, Any]
    """What GET /v1/breaker says."""
    model: ServedModel
    breaker: Breaker
    dataset: Dataset
    unguarded: RemoteServer | None
    unguarded_model: ServedModel | None
    before: Counters
    """The server's, before the first request that it answers."""
    console: Console | None = None

    @cached_property
    def prompts(self) -> list[EvalPrompt]:
        """Requests of the test split."""
        return dataset_prompts(self.dataset)

    @cached_property
    def judge(self) -> Judge:
        """The base model, loaded by the first check that needs it."""
        return Judge(
            model_id=self.breaker.manifest.base_model.id,
            chat_template=self.breaker.chat_template,
            prompts=self.prompts,
            max_new_tokens=self.settings.max_new_tokens,
            degenerate_share=self.settings.degenerate_share,
            console=self.console,
        )


def open_target(settings: GateSettings, console: Console | None = None) -> Target:
    """The target, after everything that is wrong from the start was refused.

    Raises:
        ConfigError: the bars are wrong, or the server's model is another.
        ArtifactError: the breaker is broken.
        DataError: the dataset is broken, or has no test split.
        RemoteServerError: the server does not answer, wants a key, or has no guard.
    """
    bars = load_bars(settings.bars)
    server = RemoteServer(settings.url, settings.api_key)
    unguarded = None
    if settings.unguarded_url is not None:
        unguarded = RemoteServer(settings.unguarded_url, option="--unguarded-url")
    breaker = load_breaker(settings.artifact)
    dataset = load_dataset(settings.data)
    served = _served_breaker(server)
    wanted, got = breaker.manifest.base_model.id, served["base_model"]["id"]
    if got != wanted:
        raise ConfigError(
            f"got model {got!r} at --url {server.place}, expected {wanted!r}, which the breaker in "
            "--artifact is for; give the other server, or the other breaker"
        )
    unguarded_model = None
    if unguarded is not None:
        if unguarded.ask("GET", "/v1/breaker").status == 200:
            raise ConfigError(
                f"got a guarded server at --unguarded-url {unguarded.place}, expected the base "
                "model without a guard; start one (VLLM_PLUGINS=none), or leave the option out"
            )
        unguarded_model = _served_model(unguarded)
    return Target(
        settings=settings,
        bars=bars,
        server=server,
        served=served,
        model=_served_model(server),
        breaker=breaker,
        dataset=dataset,
        unguarded=unguarded,
        unguarded_model=unguarded_model,
        before=read_counters(server),
        console=console,
    )


def ask_each(
    items: Sequence[_T], ask: Callable[[_T], _R], console: Console | None, title: str
) -> list[_R]:
    """What `ask` gives for each item, in order, several at once; the first failure ends it."""
    with _pool() as pool, progress_bar(console, title, len(items)) as progress:
        results = []
        for result in pool.map(ask, items):
            results.append(result)
            progress(1)
        return results


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _served_breaker(server: RemoteServer) -> dict[str, Any]:
    answer = server.ask("GET", "/v1/breaker")
    if answer.status == 404:
        raise RemoteServerError(
            f"got HTTP 404 for /v1/breaker from {server.place}, expected a server with a breaker; "
            "this one has no guard: check --url, and VLLM_PLUGINS on the server"
        )
    body = _json_of(answer, server, "/v1/breaker")
    base = body.get("base_model")
    if not isinstance(body.get("digest"), str) or not isinstance(base, dict) or "id" not in base:
        raise RemoteServerError(
            f"got no breaker at /v1/breaker of {server.place}, expected its digest and base model; "
            "check --url"
        )
    return body


def _served_model(server: RemoteServer) -> ServedModel:
    body = _json_of(server.ask("GET", "/v1/models"), server, "/v1/models")
    try:
        # LoRAs of the operator's stand beside it, each with its parent.
        model = next(one for one in body["data"] if not one.get("parent"))
        return ServedModel(name=str(model["id"]), max_tokens=int(model["max_model_len"]))
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as e:
        raise RemoteServerError(
            f"got no model with its max_model_len at /v1/models of {server.place}, expected one; "
            f"check {server.option}, and that the key may use the model"
        ) from e


def _json_of(answer: Answer, server: RemoteServer, path: str) -> dict[str, Any]:
    if answer.status in (401, 403):
        raise RemoteServerError(
            f"got HTTP {answer.status} for {path} from {server.place}, expected to be let in: "
            f"{answer.reason}; give a key with --api-key or CIRCUIT_BREAKERS_API_KEY"
        )
    body = answer.json
    if answer.status != 200 or not isinstance(body, dict):
        raise RemoteServerError(
            f"got HTTP {answer.status} for {path} from {server.place}, expected 200 and JSON: "
            f"{answer.reason}; check {server.option}, and that /readyz answers 200"
        )
    return body
