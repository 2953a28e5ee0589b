"""The app with a policy file and a breaker, but no engine: who gets in, and under which policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.policies.api_keys import Pepper
from circuit_breakers.settings import ServeSettings

from ..policies.manifests import manifest

SECRET = "a pepper of some length"
PEPPER = Pepper(SECRET.encode())
POLICIES = """
default = "standard"
[policies.standard]
[policies.strict]
threshold = 1.0
[policies.lax]
mode = "observe"
"""
KEYS = {"team": 'policy = "strict"', "bound": 'models = ["other"]', "ops": 'scope = ["admin"]'}
"""Id of each key, which is also the key itself, and what else its table says."""


def key_table(key_id: str, lines: str = "", key: str | None = None) -> str:
    return f'[[keys]]\nid = "{key_id}"\nhash = "{PEPPER.hash(key or key_id)}"\n{lines}\n'


def policy_file(directory: Path, *tables: str, policies: str = POLICIES) -> Path:
    """A policy file with POLICIES, KEYS and further tables; its pepper is next to it."""
    file = directory / "policies.toml"
    keys = [key_table(key_id, lines) for key_id, lines in KEYS.items()]
    file.write_text("\n".join([policies, *keys, *tables]))
    (directory / "pepper").write_text(SECRET)
    return file


def governed_app(file: Path | None, **changes: Any) -> FastAPI:
    """Everything but generation works in it."""
    if file is not None:
        changes |= {"policies": file, "pepper_file": file.with_name("pepper")}
    return create_app(ServeSettings(**changes), CollectorRegistry())


def attach(app: FastAPI) -> None:
    """Puts a breaker with probes p0 and p1, of thresholds 4 and 6, in."""
    breaker: Any = SimpleNamespace(manifest=manifest(), digest="d" * 64)
    engine = SimpleNamespace(
        errored=False, model_config=SimpleNamespace(max_model_len=64), dead_error=None
    )
    guarded = GuardedEngine(engine, breaker, "enforce", None, None)
    serving: Any = SimpleNamespace(guarded=guarded, model_name="m", max_model_len=64)
    app.state.service.attach(serving)
    app.state.service.ready()
