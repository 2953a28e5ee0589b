"""A policy file is replaced while the server runs, or stays as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from circuit_breakers.api.access import authenticate
from circuit_breakers.errors import ConfigError

from .governed_app import KEYS, POLICIES, attach, governed_app, key_table, policy_file
from .test_access import bearer, client_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return policy_file(tmp_path)


@pytest.fixture
def app(file: Path) -> FastAPI:
    app = governed_app(file)
    attach(app)
    return app


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return client_of(app)


def reload(client: TestClient, key: str = "ops") -> Any:
    return client.post("/v1/breaker/reload", headers=bearer(key))


def whoami(client: TestClient, key: str) -> Any:
    return client.post("/test/whoami", headers=bearer(key))


def test_a_new_file_takes_over_without_a_restart(client: TestClient, file: Path) -> None:
    assert whoami(client, "new").status_code == 401
    policy_file(file.parent, key_table("new", 'policy = "lax"'))
    assert whoami(client, "new").status_code == 401, "not before the reload"
    answer = reload(client).json()
    assert answer["key_ids"] == ["bound", "new", "ops", "team"]
    assert answer["policies"] == ["lax", "standard", "strict"]
    assert whoami(client, "new").json()["judged_by"] == "lax"


def test_keys_rotate_without_a_restart(client: TestClient, file: Path) -> None:
    both = file.read_text() + key_table("team", KEYS["team"], key="team-2")
    file.write_text(both)
    reload(client)
    assert [whoami(client, key).json()["id"] for key in ("team", "team-2")] == ["team", "team"]
    file.write_text(both.replace(key_table("team", KEYS["team"]), ""))
    reload(client)
    assert whoami(client, "team").status_code == 401
    assert whoami(client, "team-2").json()["id"] == "team"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "default: got nothing"),
        ("default = ", "not TOML"),
        (POLICIES, "got no keys, expected some, as the file in force has them"),
        (POLICIES.replace("threshold = 1.0", "target_fpr = 0.001"), "got target_fpr 0.001"),
        (POLICIES.replace("threshold = 1.0", 'probes = ["p9"]'), "got probe 'p9'"),
        (None, "cannot read the policy file"),
    ],
)
def test_a_bad_file_keeps_the_old_one_and_says_why(
    client: TestClient,
    app: FastAPI,
    file: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    message: str,
) -> None:
    before = app.state.service.governance.rules
    if text is None:
        file.unlink()
    else:
        keys = "" if text in ("", POLICIES) else key_table("ops", KEYS["ops"])
        file.write_text(text + "\n" + keys)
    with caplog.at_level(logging.ERROR, logger="circuit_breakers.api.governance"):
        answer = reload(client)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_policy_file"
    assert message in error["message"] and "stay in force" in error["message"]
    assert message in caplog.text
    assert app.state.service.governance.rules is before
    assert whoami(client, "team").json()["judged_by"] == "strict"


def test_reloads_and_refusals_are_acts_of_the_log(
    client: TestClient, app: FastAPI, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="circuit_breakers.api.trail"):
        digest = reload(client).json()["digest"]
        assert f"action=reload key_id=ops detail=sha256 {digest}" in caplog.text
        file.write_text("")
        reload(client)
        assert "action=reload refused key_id=ops" in caplog.text
        with pytest.raises(ConfigError):
            app.state.service.reload_policies()
        assert "action=reload refused key_id=server" in caplog.text


def test_only_an_admin_reloads(client: TestClient) -> None:
    assert reload(client, "team").status_code == 403
    assert reload(client, "nobody").status_code == 401


def test_a_request_under_way_keeps_what_it_started_with(
    client: TestClient, app: FastAPI, file: Path
) -> None:
    from fastapi import Request

    scope = {"type": "http", "app": app, "headers": [(b"api-key", b"team")]}
    caller = authenticate(Request(scope))
    file.write_text(file.read_text().replace("threshold = 1.0", "threshold = 3.0"))
    assert reload(client).status_code == 200
    assert caller.policy is not None and caller.book is not None
    assert caller.policy.policy.threshold_K.tolist() == [1.0, 1.0]
    assert caller.book.policies["strict"] is caller.policy
    later = authenticate(Request(scope | {"state": {}}))
    assert later.policy is not None
    assert later.policy.policy.threshold_K.tolist() == [3.0, 3.0]


def test_a_pepper_that_does_not_fit_ends_the_start(file: Path) -> None:
    file.with_name("pepper").write_text("another pepper, as long")
    with pytest.raises(ConfigError, match="keys of bound, ops, team were hashed with another"):
        governed_app(file)
    file.with_name("pepper").unlink()
    with pytest.raises(ConfigError, match="cannot read the pepper file"):
        governed_app(file)


def test_a_policy_that_does_not_fit_the_breaker_ends_the_start(file: Path) -> None:
    file.write_text(file.read_text().replace("threshold = 1.0", "target_fpr = 0.001"))
    app = governed_app(file)
    with pytest.raises(ConfigError, match=r"\[policies\.strict\] target_fpr"):
        attach(app)


def test_a_reload_before_the_engine_is_there_counts_from_its_start(file: Path) -> None:
    app = governed_app(file)
    policy_file(file.parent, key_table("new"))
    app.state.service.governance.reload()
    attach(app)
    assert whoami(client_of(app), "new").json()["id"] == "new"


def test_without_a_file_there_is_nothing_to_reload() -> None:
    with pytest.raises(ConfigError, match="start with --policies FILE"):
        governed_app(None).state.service.governance.reload()


def test_new_policies_have_their_series(client: TestClient, app: FastAPI, file: Path) -> None:
    more = "[policies.extra]\n"
    policy_file(file.parent, policies=POLICIES + more)
    assert 'policy="extra"' not in client.get("/metrics").text
    reload(client)
    text = client.get("/metrics").text
    assert 'circuit_breakers_requests_total{model="smollm2-135m-instruct",outcome="ok",' in text
    for name in ("standard", "strict", "lax", "extra"):
        assert f'policy="{name}"' in text


def test_breaker_info_tells_the_mode_after_a_reload(
    client: TestClient, app: FastAPI, file: Path
) -> None:
    def info() -> str:
        lines = client.get("/metrics").text.splitlines()
        (line,) = (x for x in lines if x.startswith("circuit_breakers_breaker_info{"))
        return line

    assert 'mode="enforce"' in info() and 'policy="standard"' in info()
    policy_file(file.parent, policies=POLICIES.replace('default = "standard"', 'default = "lax"'))
    assert reload(client).status_code == 200
    assert 'mode="observe"' in info() and 'policy="lax"' in info()
    # Those that never came to have a policy count under the default.
    app.state.service.new_record({}).finish("rejected")
    assert (
        app.state.service.registry.get_sample_value(
            "circuit_breakers_requests_total",
            {"model": "smollm2-135m-instruct", "policy": "lax", "outcome": "rejected"},
        )
        == 1
    )
