"""What a run was made with: enough to set it up again, and nothing about whose machine it is."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["describe_environment", "machine_text"]

_PACKAGES = (
    "circuit-breakers",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "scikit-learn",
    "numpy",
    "safetensors",
)


def machine_text() -> str:
    """Kind of machine, in a line: what times were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def describe_environment() -> dict[str, Any]:
    """Versions and kind of machine, as plain JSON; no host, user or path."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "machine": machine_text(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
    }
