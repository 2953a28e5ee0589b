"""Fuzz targets of the breaker on disk: what is read can be written back the same, and served.

Shapes: T tokens, K probes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from circuit_breakers.artifact import Breaker, Manifest, load_breaker, save_breaker
from circuit_breakers.artifact.manifest_json import manifest_from_json, manifest_to_json
from circuit_breakers.artifact.tensors import (
    check_adapter_tensors,
    probes_from_safetensors,
    probes_to_safetensors,
)
from circuit_breakers.errors import ArtifactError
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy
from circuit_breakers.metrics import GuardMetrics
from circuit_breakers.metrics.drift import MIN_REQUESTS, DriftWindow

__all__ = ["FILES", "GOLDEN", "breaker", "histogram", "manifest", "scratch", "tensors"]

GOLDEN = Path(__file__).parents[1] / "golden" / "breaker-v1"
FILES = (
    "manifest.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "probes.safetensors",
    "report.md",
)
"""Of the golden breaker; the first byte of an input says which of them it stands for."""


@cache
def scratch() -> Path:
    """A folder of this process, whose files an input replaces."""
    shared_memory = Path("/dev/shm")
    keeper = tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None)
    _keepers.append(keeper)
    return Path(keeper.name)


_keepers: list[tempfile.TemporaryDirectory[str]] = []


def manifest(data: bytes) -> bool:
    """manifest.json."""
    try:
        read = manifest_from_json(data, "manifest.json")
    except ArtifactError:
        return False
    _check_writable(read)
    _check_servable(read)
    return True


def histogram(data: bytes) -> bool:
    """The histogram of a calibration: JSON in the place of that of the golden breaker's probe."""
    whole = json.loads((GOLDEN / "manifest.json").read_bytes())
    whole["probes"][0]["calibration"]["histogram"] = {"prompt": "HERE", "completion": "HERE"}
    try:
        read = manifest_from_json(json.dumps(whole).encode().replace(b'"HERE"', data), "x")
    except ArtifactError:
        return False
    _check_writable(read)
    for seen in (read.probes[0].calibration.histogram or {}).values():
        window = DriftWindow(seen)
        for _ in range(MIN_REQUESTS):
            window.add(seen.edges[0])
        assert sum(window.counts) == MIN_REQUESTS and math.isfinite(window.index)
    return True


def tensors(data: bytes) -> bool:
    """Safetensors: the adapter's if the first byte is odd, else the golden breaker's probes."""
    probes = load_breaker(GOLDEN).manifest.probes
    try:
        if data[:1] and data[0] % 2:
            check_adapter_tensors(data[1:], "adapter_model.safetensors")
            return True
        read = probes_from_safetensors(data[1:], probes, 8, "probes.safetensors")
    except ArtifactError:
        return False
    again = probes_from_safetensors(probes_to_safetensors(read), probes, 8, "again")
    assert list(again) == list(read) == [probe.name for probe in probes]
    for name, weights in read.items():
        assert np.array_equal(again[name].weight_D, weights.weight_D)
        assert again[name].bias == weights.bias
    return True


def breaker(data: bytes) -> bool:
    """A whole directory: the golden breaker with one file replaced, and its digest with it."""
    path = scratch() / "breaker"
    if not path.exists():
        shutil.copytree(GOLDEN, path)
    name = FILES[data[0] % len(FILES)] if data else FILES[0]
    _replace(path, name, data[1:])
    try:
        read = load_breaker(path)
        _check_saved_again(read)
    except ArtifactError:
        return False
    finally:
        for changed in {name, FILES[0]}:
            shutil.copyfile(GOLDEN / changed, path / changed)
    _check_servable(read.manifest)
    return True


def _replace(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    if name == FILES[0]:
        return
    listed = json.loads((GOLDEN / FILES[0]).read_bytes())
    listed["files"][name] = hashlib.sha256(content).hexdigest()
    (path / FILES[0]).write_text(json.dumps(listed))


def _check_saved_again(read: Breaker) -> None:
    """Training would write it as it is, but for the adapter's config, which is put in order."""
    listed = read.manifest
    extra = [name for name in listed.files if name not in FILES[1:4]]
    again = save_breaker(
        read.path.with_name("again"),
        **{name: getattr(listed, name) for name in ("name", "base_model", "recipe", "probes")},
        data_sha256=listed.data_sha256,
        weights=read.weights,
        adapter_dir=read.adapter_dir,
        canaries=listed.canaries,
        created=listed.created,
        extra_files={name: read.path / name for name in extra},
        overwrite=True,
    )
    changed = {FILES[1], FILES[3]}
    assert _without(again.manifest, changed) == _without(listed, changed)
    assert again.weights.keys() == read.weights.keys()


def _without(listed: Manifest, names: set[str]) -> dict[str, Any]:
    fields = listed.model_dump()
    return fields | {"files": {k: v for k, v in fields["files"].items() if k not in names}}


def _check_writable(read: Manifest) -> None:
    written = manifest_to_json(read)
    again = manifest_from_json(written, "again")
    assert again == read
    assert manifest_to_json(again) == written


def _check_servable(read: Manifest) -> None:
    """A server with it judges a stream, and tells of it at /metrics."""
    policy = Policy.from_manifest(read, "enforce")
    stream = StreamBreaker(policy, num_prompt_tokens=2)
    logit_TK = np.zeros((4, len(read.probes)), np.float32)
    stream.update(logit_TK)
    assert policy.screen.is_harmless(logit_TK) in (True, False)
    assert stream.report().num_scored == 4
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry, model="m")
    metrics.describe_breaker(read, "0" * 64, policy.name, policy.mode)
    assert b"circuit_breakers_breaker_info{" in generate_latest(registry)
