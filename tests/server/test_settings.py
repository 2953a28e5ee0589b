"""Settings come from flags, then variables, then defaults, and never half."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers.settings import ENV_PREFIX, ServeSettings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)


def test_a_flag_wins_over_its_variable_and_the_variable_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_settings().port == 8000
    monkeypatch.setenv("CIRCUIT_BREAKERS_PORT", "9000")
    assert load_settings(port=None).port == 9000
    assert load_settings(port=9001).port == 9001


def test_a_bad_value_is_named_by_the_place_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_MODE", "off")
    with pytest.raises(ConfigError, match=r"CIRCUIT_BREAKERS_MODE: got 'off'.*'observe'"):
        load_settings()
    with pytest.raises(ConfigError, match=r"--port: got 70000"):
        load_settings(mode="observe", port=70000)
    with pytest.raises(ConfigError, match=r"--target-fpr: got 1\.0"):
        load_settings(mode="observe", target_fpr=1.0)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prot: got 1"):
        load_settings(prot=1)


def test_a_kubernetes_service_link_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_PORT", "tcp://10.0.0.1:8000")
    assert load_settings().port == 8000


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1


def test_the_served_name_hides_the_path_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert load_settings(model=str(tmp_path / "my-model")).model_name == "my-model"
    assert load_settings(model="org/model").model_name == "org/model"
    assert load_settings(model="org/model", served_name="m").model_name == "m"


def test_every_field_is_a_flag_of_serve() -> None:
    import inspect

    from circuit_breakers.cli import serve

    assert set(inspect.signature(serve).parameters) == set(ServeSettings.model_fields)
