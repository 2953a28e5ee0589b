"""README.md and the schema say what values.yaml and serve say."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
import yaml

from circuit_breakers.settings import ServeSettings

from .conftest import CHART


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helm_generate", CHART / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_derived_is_current(generate: ModuleType) -> None:
    derived = generate.generated()
    assert {path.name for path in derived} == {"README.md", "values.schema.json"}
    stale = [path.name for path, text in derived.items() if path.read_text() != text]
    assert stale == [], "run python helm/generate.py"


def test_every_setting_of_serve_is_a_value_or_the_charts_own(generate: ModuleType) -> None:
    offered = set(generate.settings_schema()["properties"])
    assert "maxModelLen" in offered
    assert len(offered) + len(generate.CHART_SETS) == len(ServeSettings.model_fields)


def test_every_value_is_in_the_table_and_in_the_schema(generate: ModuleType) -> None:
    text = (CHART / "values.yaml").read_text()
    rows = {row.key: row for row in generate.value_rows(text)}
    schema = json.loads((CHART / "values.schema.json").read_text())

    def walk(values: dict[str, object], known: dict[str, object], path: str) -> None:
        for name, value in values.items():
            key = f"{path}{name}"
            assert name in known, f"{key} is not in the schema"
            below = known[name].get("properties")  # type: ignore[attr-defined]
            if isinstance(value, dict) and value and below and key not in rows:
                walk(value, below, f"{key}.")
            else:
                assert rows[key].text

    walk(yaml.safe_load(text), schema["properties"], "")


def test_the_readme_makes_the_image_that_the_chart_asks_for(generate: ModuleType) -> None:
    readme = (CHART / "README.md").read_text()
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    image = f"registry.example.com/circuit-breakers:{version}"
    assert f"--target cpu -t {image} ." in readme
    assert f"docker push {image}" in readme
    assert f"--set image.repository={image.partition(':')[0]}" in readme


def test_a_value_without_a_comment_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match="got a without a comment"):
        generate.value_rows("a: 1\n")
