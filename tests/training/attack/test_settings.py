"""Settings out of range are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.attack.settings import SearchSettings, SoftPromptSettings

PLACES: dict[str, Any] = {"artifact": Path("a"), "data": Path("d"), "out": Path("o")}
SECRET = "key-of-the-server"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("limit", 0, "limit 0"),
        ("steps", 0, "steps 0"),
        ("tokens", 0, "tokens 0"),
        ("check_every", 0, "check_every 0"),
        ("max_new_tokens", 31, "--max-new-tokens 31"),
        ("learning_rate", 0.0, "learning rate of 0.0"),
        ("learning_rate", float("nan"), "learning rate of nan"),
        ("penalty", -1.0, "penalty -1.0"),
        ("margin", float("nan"), "margin nan"),
        ("degenerate_share", 1.0, "share of 1.0"),
        ("backend", "magic", "backend 'magic'"),
    ],
)
def test_a_soft_prompt_out_of_range(field: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}, expected"):
        SoftPromptSettings(**PLACES, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("queries", 0, "queries 0"),
        ("population", 1, "population of 1"),
        ("temperature", -0.5, "temperature -0.5"),
        ("methods", (), "methods none"),
        ("methods", ("magic",), "methods magic"),
        ("url", "127.0.0.1:8000", "--url"),
    ],
)
def test_a_search_out_of_range(field: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SearchSettings(**{**PLACES, "url": "http://127.0.0.1:1", field: value})


def test_results_hold_no_path_and_no_secret() -> None:
    settings = SearchSettings(
        **PLACES, url=f"http://user:{SECRET}@host/", api_key=SECRET, methods=("genetic",)
    )
    told = settings.to_json()
    assert SECRET not in str(told)
    assert {"artifact", "data", "out", "url"}.isdisjoint(told)
    assert (told["queries"], told["seed"], told["methods"]) == (100, 0, ("genetic",))
