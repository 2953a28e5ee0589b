"""The examples run as they stand; those whose packages are not installed are skipped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ...server.api.capitals import BEFORE_PARIS, FRANCE, ITALY, ROME, ZEBRA
from ..conftest import Guarded

PACKAGE = Path(__file__).parents[3] / "clients" / "python"
EXAMPLES = {
    "plain_openai.py": "openai",
    "plain_requests.py": "requests",
    "langchain_chat.py": "langchain_openai",
    "litellm_chat.py": "litellm",
}
"""The package that each needs."""


def test_every_example_is_run() -> None:
    assert {path.name for path in (PACKAGE / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_shows_what_passed_and_what_tripped(name: str, guarded: Guarded) -> None:
    if importlib.util.find_spec(EXAMPLES[name]) is None:
        pytest.skip(f"{EXAMPLES[name]} is not installed; pip install it to run this example")
    path = os.pathsep.join([str(PACKAGE), *sys.path])
    done = subprocess.run(
        [sys.executable, PACKAGE / "examples" / name, ITALY, FRANCE, ZEBRA],
        env=os.environ | guarded.environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"'{ROME}', tripped: False" in done.stdout
    assert f"'{BEFORE_PARIS}', tripped: True" in done.stdout
    assert "the prompt was stopped" in done.stdout
