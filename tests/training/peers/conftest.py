"""The tiny breaker and dataset of the evaluation's tests, and one cache for merged checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.peers.cases import Case
from circuit_breakers_training.render import load_tokenizer, render

from ...fetched_packages import fetched_packages
from ..evaluation.conftest import breaker_dir, data_dir, plain_breaker_dir, roomy_llama

__all__ = ["breaker_dir", "data_dir", "make_case", "plain_breaker_dir", "roomy_llama"]


def make_case(tokenizer: Any, label: Label, prompt: str, answer: str) -> Case:
    messages = (Message("user", prompt), Message("assistant", answer))
    conversation = Conversation(messages=messages, label=label, source="s", group=prompt)
    return Case(conversation, render(tokenizer, messages, max_length=64), tokenizer)


@pytest.fixture(scope="session")
def tokenizer(roomy_llama: Path) -> Any:
    return load_tokenizer(roomy_llama, "model")


@pytest.fixture(scope="session")
def merged_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(autouse=True)
def _own_cache(merged_cache: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    # The built-in model is converted, and packages are fetched, into the user's cache, once.
    if not {"smollm2", "peer_packages"} & set(request.fixturenames):
        monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(merged_cache))


@pytest.fixture
def peer_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with requirements/peers.txt, importable for one test."""
    folder = fetched_packages("peers")
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("better_profanity", "prompt_injection_defense"):
            del sys.modules[name]


def scores(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)
