"""The tiny breaker and dataset of the evaluation's tests, and one cache for merged checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuit_breakers_training.attack.settings import SoftPromptSettings

from ..evaluation.conftest import breaker_dir, data_dir, plain_breaker_dir, roomy_llama

__all__ = ["breaker_dir", "data_dir", "plain_breaker_dir", "roomy_llama"]


@pytest.fixture(scope="session")
def merged_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(autouse=True)
def _own_cache(merged_cache: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    # The built-in model is converted into the user's cache, once for all runs.
    if "server" not in request.fixturenames:
        monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(merged_cache))


@pytest.fixture
def settings(
    breaker_dir: Path, data_dir: Path, roomy_llama: Path, tmp_path: Path
) -> SoftPromptSettings:
    return SoftPromptSettings(
        artifact=breaker_dir,
        data=data_dir,
        model=str(roomy_llama),
        out=tmp_path / "out",
        limit=2,
        steps=3,
        tokens=4,
        learning_rate=0.05,
        check_every=2,
        max_new_tokens=6,
        answer_tokens=6,
        backend="transformers",
    )
