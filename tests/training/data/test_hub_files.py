"""The real huggingface_hub against a small hub on this machine; no connection leaves it."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.hub_files import hub_files
from circuit_breakers_training.data.sources import SourceSpec, locate, read_source

from ...local_server import answering, url_of

COMMIT = "c" * 40
ROW = {"prompt": "A request", "output": "PLACEHOLDER", "llama3_output": "No."}
FILES = {
    "README.md": b"# A data set",
    "data/train-0.jsonl": json.dumps(ROW).encode(),
    "data/train-1.jsonl": json.dumps(ROW | {"prompt": "Another request"}).encode(),
    "data/test-0.jsonl": json.dumps(ROW).encode(),
}
SETS = {"org/many": FILES, "org/one": {"README.md": b"", "cb.json": json.dumps([ROW]).encode()}}


class _Hub(BaseHTTPRequestHandler):
    """Two data sets at one commit, and a gated one."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        parts = self.path.strip("/").split("?")[0].split("/")
        is_api = parts[0] == "api"
        owner, name, *rest = parts[2:] if is_api else parts[1:]
        files = SETS.get(f"{owner}/{name}")
        if name == "gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body=body)
        elif files is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif is_api:
            info = {
                "id": f"{owner}/{name}",
                "sha": COMMIT,
                "siblings": [{"rfilename": file} for file in files],
            }
            self._send(200, json.dumps(info).encode(), {}, body=body)
        elif "/".join(rest[2:]) in files:
            content = files["/".join(rest[2:])]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}, body=body)
        else:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"", headers, body=body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub_url() -> Iterator[str]:
    with answering(_Hub) as server:
        yield url_of(server)


@pytest.fixture
def hub(hub_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    from huggingface_hub import constants

    template = hub_url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return monkeypatch


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("location", "names"),
    [
        ("hf:org/many:data/train-0.jsonl", ["data/train-0.jsonl"]),
        ("hf:org/many@main:data/train-*", ["data/train-0.jsonl", "data/train-1.jsonl"]),
        (f"hf:org/many@{COMMIT}:*.jsonl", sorted(f for f in FILES if f.endswith("l"))),
        ("hf:org/one", ["cb.json"]),
    ],
)
def test_files_come_with_their_commit(location: str, names: list[str]) -> None:
    found = hub_files(location)
    assert found.revision == COMMIT
    assert [path.read_bytes() for path in found.paths] == [
        {**FILES, **SETS["org/one"]}[name] for name in names
    ]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf:org/many", r"got 3 files, expected one data file; .*data/test-0\.jsonl, data/train-0"),
        ("hf:org/many:*.csv", "got 0 files, expected some that fit; name one after a colon"),
        ("hf:org/many:none.csv", "got no such file in the data set"),
        ("hf:org/many@v2:data/test-0.jsonl", "got a revision that is not there"),
        ("hf:org/none:a.csv", "got no such data set on the hub"),
        ("hf:org/gated:a.csv", "the data set is gated"),
        ("hf:org", r"got the location \"hf:org\", expected hf:OWNER/NAME"),
        ("hf:a/b:", "expected hf:OWNER/NAME"),
        ("hf:../b", "expected hf:OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_named(location: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hub_files(location)


def test_offline_a_cached_file_is_found_and_another_is_named(hub: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    online = hub_files("hf:org/one:cb.json")
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.setenv("HF_HUB_OFFLINE", "1")
    assert hub_files("hf:org/one:cb.json") == online
    for location in ("hf:org/many:data/test-0.jsonl", "hf:org/one", "hf:org/one:*.json"):
        with pytest.raises(DataError, match="not in the hub cache, and HF_HUB_OFFLINE is set"):
            hub_files(location)


@pytest.mark.usefixtures("hub")
def test_a_source_on_the_hub_is_read_part_by_part() -> None:
    located = locate(SourceSpec(location="hf:org/many:data/train-*.jsonl"))
    assert [row.prompt for row in read_source(located).rows] == ["A request", "Another request"]
    described = located.describe()
    assert described["from"] == "hf:org/many:data/train-*.jsonl"
    assert described["revision"] == COMMIT
    assert list(described["files"]) == ["train-0.jsonl", "train-1.jsonl"]
