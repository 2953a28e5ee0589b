"""The console's files: who gets them, with which headers, and under which names only."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.console import CONSOLE_PATHS
from circuit_breakers.api.endpoint_plugin import RouteGate
from circuit_breakers.settings import ServeSettings

from .governed_app import governed_app, policy_file

ROOT = Path(__file__).parents[3]
BUILT = ROOT / "server" / "circuit_breakers" / "console"
MEDIA_TYPES = {
    "/console": "text/html; charset=utf-8",
    "/console/assets/console.css": "text/css; charset=utf-8",
    "/console/assets/console.js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(ServeSettings(), CollectorRegistry()))


@pytest.mark.parametrize("path", sorted(MEDIA_TYPES))
def test_each_file_comes_as_it_was_built_with_headers_that_let_nothing_else_in(
    client: TestClient, path: str
) -> None:
    answer = client.get(path)
    name = path.removeprefix("/console").removeprefix("/") or "index.html"
    assert (answer.status_code, answer.content) == (200, (BUILT / name).read_bytes())
    assert answer.headers["Content-Type"] == MEDIA_TYPES[path]
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    kept = client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (kept.status_code, kept.content) == (304, b"")
    assert kept.headers["ETag"] == answer.headers["ETag"]
    assert client.get(path, headers={"If-None-Match": '"older"'}).status_code == 200


def test_no_file_of_the_build_is_left_out() -> None:
    built = {str(file.relative_to(BUILT)) for file in BUILT.rglob("*") if file.is_file()}
    served = {path.removeprefix("/console/") for path in CONSOLE_PATHS - {"/console"}}
    assert built == served | {"index.html", "LICENSES.md"}


def test_it_wants_no_key_where_everything_else_does(tmp_path: Path) -> None:
    client = TestClient(governed_app(policy_file(tmp_path)))
    assert client.get("/v1/breaker").status_code == 401
    for path in MEDIA_TYPES:
        assert client.get(path).status_code == 200


def test_the_gate_in_vllms_own_server_lets_the_files_through_and_nothing_beside_them() -> None:
    app = create_app(ServeSettings(), CollectorRegistry())
    client = TestClient(RouteGate(app, app.state.service))
    for path in MEDIA_TYPES:
        assert client.get(path).status_code == 200
    for path in ("/console/", "/console/assets/consoleXjs", "/console/index.html"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "not served next to a breaker" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_refused(client: TestClient, method: str) -> None:
    for path in MEDIA_TYPES:
        assert client.request(method, path).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        *("/console/", "/console/index.html", "/console/assets", "/console/assets/"),
        *("/console/assets/index.html", "/console/assets/console.js/", "/console/console.js"),
        *("/console/assets/Console.js", "/console/assets/console.js.map", "/assets/console.js"),
        *("/console/assets/%2e%2e/index.html", "/console/assets/..%2f..%2fapi%2fapp.py"),
        *("/console/assets//console.js", "/console/assets/console%2ejs", "/console;x", "/Console"),
    ],
)
def test_no_other_name_answers(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")


def test_the_page_names_nothing_outside_its_own_files() -> None:
    html = (BUILT / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:src|href)="([^"#]+)', html))
    assert {name for name in named if not name.startswith("data:")} == (
        CONSOLE_PATHS - {"/console"}
    )
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def test_wheel_and_source_archive_have_the_files(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = {"index.html", "LICENSES.md", "assets/console.js", "assets/console.css"}
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"circuit_breakers/console/{name}" for name in names} <= set(
        zipfile.ZipFile(wheel).namelist()
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"server/circuit_breakers/console/{name}" for name in names} <= inside
    assert {"clients/console/package-lock.json", "clients/console/src/main.ts"} <= inside
    assert not any("node_modules" in name for name in inside)
