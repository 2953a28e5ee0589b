"""A breaker on disk: save it atomically, load it only if every byte is what the manifest says.

    <breaker>/
      manifest.json                        digests of all other files
      adapter/adapter_config.json          plain PEFT LoRA
      adapter/adapter_model.safetensors
      probes.safetensors
      chat_template.jinja                  only where it is not the model's own
      report.html, report.md, metrics.json, plots/...   what was measured, for people

Nothing is ever unpickled. Loading reads each file once and checks the bytes that it uses.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from pydantic import JsonValue

from circuit_breakers.artifact.files import list_files, publish, read_file, write_files
from circuit_breakers.artifact.manifest import (
    SCHEMA_VERSION,
    BaseModelSpec,
    Canary,
    Manifest,
    ProbeSpec,
)
from circuit_breakers.artifact.manifest_json import (
    manifest_from_json,
    manifest_to_json,
    parse_manifest,
)
from circuit_breakers.artifact.tensors import (
    ProbeWeights,
    check_adapter_tensors,
    check_probe_weights,
    normalised_adapter_config,
    parse_adapter_config,
    probes_from_safetensors,
    probes_to_safetensors,
)
from circuit_breakers.errors import ArtifactError, BreakerMismatchError

__all__ = ["CHAT_TEMPLATE", "Breaker", "builtin_breaker_path", "load_breaker", "save_breaker"]

MANIFEST = "manifest.json"
PROBES = "probes.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
_CORE_FILES = frozenset({PROBES, ADAPTER_CONFIG, ADAPTER_WEIGHTS})
# What a report is made of. An allow-list: no pickle, no code, no second set of weights.
_EXTRA_SUFFIXES = (
    *(".md", ".html", ".json", ".jsonl", ".png", ".csv", ".toml", ".txt"),
    ".jinja",
)


_CURE = "load the very model that the breaker was made for, or train a breaker for this one"
_CURES = {
    "id": "pass --model with the name that the breaker is for, or train a breaker for this model",
    "revision": "pass that revision, or train a breaker for this one",
}


@dataclass(frozen=True)
class Breaker:
    """A breaker artifact whose digests, shapes and weights have been checked."""

    path: Path
    manifest: Manifest
    digest: str
    """sha256 of the bytes of manifest.json. It covers every file, as the manifest lists digests."""
    weights: Mapping[str, ProbeWeights]
    """By probe name, in the manifest's order."""

    @property
    def adapter_dir(self) -> Path:
        """Directory of the LoRA adapter, for peft and vLLM."""
        return self.path / "adapter"

    @property
    def chat_template(self) -> Path | None:
        """The chat template that the probe was calibrated with; None: the model's own."""
        return self.path / CHAT_TEMPLATE if CHAT_TEMPLATE in self.manifest.files else None

    def check_fits(self, model: BaseModelSpec) -> None:
        """Pass if this breaker was made for exactly `model`.

        Raises:
            BreakerMismatchError: another model, revision, architecture or width.
        """
        made_for = self.manifest.base_model
        for field in BaseModelSpec.model_fields:
            want, got = getattr(made_for, field), getattr(model, field)
            if want != got:
                raise BreakerMismatchError(
                    f"breaker {self.manifest.name!r} is for {made_for.id!r} with {field}={want!r}, "
                    f"got {model.id!r} with {field}={got!r}; {_CURES.get(field, _CURE)}"
                )


def load_breaker(path: Path) -> Breaker:
    """The breaker in directory `path`, verified in full.

    Raises:
        ArtifactError: anything is missing, unknown, altered, of another version, or not finite.
    """
    files = list_files(path)
    if MANIFEST not in files:
        raise ArtifactError(
            f"{path}: got no {MANIFEST}, expected a breaker directory; check the path"
        )
    manifest_bytes = read_file(path / MANIFEST)
    manifest = manifest_from_json(manifest_bytes, str(path / MANIFEST))
    _check_file_names(path, manifest, files - {MANIFEST})
    core: dict[str, bytes] = {}
    for name, want in manifest.files.items():
        data = read_file(path / name)
        got = hashlib.sha256(data).hexdigest()
        if got != want:
            raise ArtifactError(
                f"{path / name}: got sha256 {got}, expected {want} as {MANIFEST} says; the file "
                "was altered after export or torn in a copy: copy or export the breaker again"
            )
        if name in _CORE_FILES:
            core[name] = data
    parse_adapter_config(core[ADAPTER_CONFIG], str(path / ADAPTER_CONFIG))
    check_adapter_tensors(core[ADAPTER_WEIGHTS], str(path / ADAPTER_WEIGHTS))
    weights = probes_from_safetensors(
        core[PROBES], manifest.probes, manifest.base_model.hidden_size, str(path / PROBES)
    )
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    return Breaker(path=path, manifest=manifest, digest=digest, weights=weights)


def save_breaker(
    out: Path,
    *,
    name: str,
    base_model: BaseModelSpec,
    recipe: Mapping[str, JsonValue],
    data_sha256: Mapping[str, str],
    probes: Sequence[ProbeSpec],
    weights: Mapping[str, ProbeWeights],
    adapter_dir: Path,
    canaries: Sequence[Canary],
    extra_files: Mapping[str, Path | bytes],
    created: datetime | None = None,
    overwrite: bool = False,
) -> Breaker:
    """The breaker, written to directory `out`: either whole or not at all.

    It is built beside `out`, verified as if loaded, and renamed into place.

    Args:
        adapter_dir: a directory that PEFT's save_pretrained wrote; other files in it are left out.
        extra_files: report files by relative POSIX path, e.g. "plots/roc.png"; paths are copied.
        created: now, unless given.
        overwrite: replace a breaker that is there.
    Raises:
        ArtifactError: `out` exists, or the parts do not make a sound breaker.
    """
    out = out.absolute()
    if not overwrite and (out.exists() or out.is_symlink()):
        raise ArtifactError(
            f"{out} exists, expected a new directory; choose another name or ask to overwrite it"
        )
    # Overwriting removes a whole directory: only ever one that is a breaker.
    if out.exists() and not (out / MANIFEST).is_file():
        raise ArtifactError(
            f"{out} exists and is no breaker, expected a breaker to overwrite; choose another name"
        )
    check_probe_weights(weights, probes, base_model.hidden_size, "save_breaker")
    config_path = adapter_dir / "adapter_config.json"
    config = parse_adapter_config(read_file(config_path), str(config_path))
    contents: dict[str, bytes] = {
        PROBES: probes_to_safetensors(weights),
        ADAPTER_CONFIG: normalised_adapter_config(config, base_model),
        ADAPTER_WEIGHTS: read_file(adapter_dir / "adapter_model.safetensors"),
    }
    for file, content in extra_files.items():
        _check_extra_name(file)
        contents[file] = content if isinstance(content, bytes) else read_file(content)
    manifest = parse_manifest(
        {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "base_model": base_model,
            "created": created or datetime.now(UTC).replace(microsecond=0),
            "recipe": dict(recipe),
            "data_sha256": dict(data_sha256),
            "probes": tuple(probes),
            "canaries": tuple(canaries),
            "files": {k: hashlib.sha256(v).hexdigest() for k, v in sorted(contents.items())},
        },
        "save_breaker",
    )
    contents[MANIFEST] = manifest_to_json(manifest)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        write_files(partial, contents)
        breaker = load_breaker(partial)
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(breaker, path=out)


def builtin_breaker_path(model_name: str) -> Path | None:
    """Directory of the breaker that this package carries for `model_name`, or None."""
    # The name may come from a command line; it must not climb out of the package.
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", model_name):
        return None
    path = Path(__file__).parent.parent / "breakers" / model_name
    return path if (path / MANIFEST).is_file() else None


def _check_file_names(path: Path, manifest: Manifest, found: set[str]) -> None:
    listed = set(manifest.files)
    for what, files, cure in (
        ("lists no", _CORE_FILES - listed, "export the breaker again"),
        ("has no", listed - found, "copy or export the breaker again"),
        ("has unlisted", found - listed, "remove what does not belong to the breaker"),
    ):
        if files:
            raise ArtifactError(
                f"{path} {what} {', '.join(sorted(files))}, expected exactly the files that "
                f"{MANIFEST} lists; {cure}"
            )
    for file in sorted(listed - _CORE_FILES):
        _check_extra_name(file)


def _check_extra_name(name: str) -> None:
    path = PurePosixPath(name)
    if (
        name != path.as_posix()
        or path.is_absolute()
        or not path.parts
        or any(part.startswith(".") for part in path.parts)
        or path.parts[0] == "adapter"
        or name == MANIFEST
        or path.suffix not in _EXTRA_SUFFIXES
    ):
        raise ArtifactError(
            f"got extra file {name!r}, expected a plain relative path outside adapter/ that "
            f"ends in {', '.join(_EXTRA_SUFFIXES)}; leave it out: a breaker holds no pickle, no "
            "code and no second set of weights"
        )
