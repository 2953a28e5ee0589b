"""What a report says about where it was made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

from circuit_breakers_training.environment import describe_environment, machine_text


def test_names_versions_and_kind_of_machine() -> None:
    environment = describe_environment()
    assert environment["packages"]["torch"] == version("torch")
    assert environment["python"] == platform.python_version()
    assert environment["machine"] == machine_text()


def test_names_no_host_user_or_path() -> None:
    environment = describe_environment()
    assert set(environment) == {"machine", "system", "python", "packages"}
    assert str(Path.home()) not in json.dumps(environment)
