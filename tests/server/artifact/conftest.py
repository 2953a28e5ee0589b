"""A tiny breaker to save, load and damage."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.artifact import Breaker, save_breaker

GOLDEN = Path(__file__).parents[2] / "golden"

Parts = dict[str, Any]
Edit = Callable[[Any], None]


@pytest.fixture
def golden_path() -> Path:
    return GOLDEN / "breaker-v1"


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Arguments of save_breaker that make the golden breaker."""
    maker = runpy.run_path(str(GOLDEN / "make_breaker_v1.py"))
    result: Parts = maker["breaker_parts"](maker["write_adapter"](tmp_path / "adapter-in"))
    return result


@pytest.fixture
def saved(parts: Parts, tmp_path: Path) -> Breaker:
    return save_breaker(tmp_path / "breaker", **parts)


@pytest.fixture
def forge(saved: Breaker) -> Callable[[str, bytes], Path]:
    """Replace or add a file and put its right digest into the manifest, as an attacker would."""

    def _forge(name: str, data: bytes) -> Path:
        path = saved.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        manifest = json.loads((saved.path / "manifest.json").read_bytes())
        manifest["files"][name] = hashlib.sha256(data).hexdigest()
        (saved.path / "manifest.json").write_text(json.dumps(manifest))
        return saved.path

    return _forge


@pytest.fixture
def edit_manifest(saved: Breaker) -> Callable[[Edit], Path]:
    """Change the parsed manifest in place and write it back."""

    def _edit(change: Edit) -> Path:
        manifest = json.loads((saved.path / "manifest.json").read_bytes())
        change(manifest)
        (saved.path / "manifest.json").write_text(json.dumps(manifest))
        return saved.path

    return _edit
