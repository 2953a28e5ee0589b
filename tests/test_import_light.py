"""Importing the product costs little: the heavy libraries stay inside the layers that need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "vllm",
    "transformers",
    "peft",
    "fastapi",
    "starlette",
    "uvicorn",
    "sklearn",
    "scipy",
    "matplotlib",
    "huggingface_hub",
    "prometheus_client",
    "sqlalchemy",
}


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter that ran `statement`."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "circuit_breakers",
        "circuit_breakers.artifact",
        "circuit_breakers.audit.entry",
        "circuit_breakers.audit.verification",
        "circuit_breakers.audit.whatif",
        "circuit_breakers.guard.aggregation",
        "circuit_breakers.guard.breaker",
        "circuit_breakers.guard.policy",
        "circuit_breakers.guard.decision",
        "circuit_breakers.models",
        "circuit_breakers.policies.policy_book",
        "circuit_breakers.settings",
        "circuit_breakers.cli",
        "circuit_breakers_training",
    ],
)
def test_loads_no_heavy_library(module: str) -> None:
    top_level = {name.partition(".")[0] for name in modules_after(f"import {module}")}
    assert module.partition(".")[0] in top_level
    assert top_level & HEAVY == set()


def test_top_level_import_loads_only_its_own_modules() -> None:
    added = modules_after("import circuit_breakers") - modules_after("pass")
    assert {name for name in added if name.startswith("circuit_breakers")} == {
        "circuit_breakers",
        "circuit_breakers.errors",
    }
    # 5 is slack for what the import system itself pulls in; numpy alone would be 100.
    assert len(added) <= 7
