"""The base model with the breaker's adapter merged into its weights, as a checkpoint on disk.

W_merged = W + (alpha / r) * B @ A in float32, rounded once to the base model's dtype. A merged
checkpoint costs nothing per token and runs wherever the base model runs. The probe is fitted on
exactly these weights.

A directory appears under its final name only when it is complete: it is written under a temporary
name, flushed to disk, then renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from circuit_breakers.artifact.store import Breaker
from circuit_breakers.engine.config import MERGE_MARKER
from circuit_breakers.errors import ArtifactError, ModelError
from circuit_breakers.models import ResolvedModel, cache_dir

__all__ = ["check_mergeable", "merge_adapter", "merge_key", "merged_checkpoint"]

logger = logging.getLogger(__name__)

_FORMAT = "merge-2"
"""Part of the cache key; changes whenever the same inputs would give other bytes."""
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
"""Config, tokenizer and chat template come from the base model byte for byte."""
_CHUNK_BYTES = 1 << 22


def merged_checkpoint(model: ResolvedModel, breaker: Breaker) -> Path:
    """Directory of `model` with the adapter of `breaker` merged in; made once, then cached.

    A chat template of the breaker's own takes the place of the model's. The cache key covers the
    model's config and weights, the adapter's files and that template, so another breaker, revision
    or set of weights never meets an old merge. Processes that race for the same key wait for the
    first one.

    Raises:
        BreakerMismatchError: the breaker was made for another model.
        ArtifactError: the adapter does not fit the weights, or gives weights that are not finite.
        ModelError: the base checkpoint is incomplete or quantised.
    """
    breaker.check_fits(model.spec())
    root = cache_dir() / "merged"
    root.mkdir(parents=True, exist_ok=True)
    template = breaker.chat_template
    key = merge_key(model, breaker.adapter_dir, chat_template=template)
    target = root / key
    if target.is_dir():
        return target
    with _exclusive(root / f"{key}.lock"):
        if not target.is_dir():
            logger.info("merging adapter: model=%s key=%s", model.name, key)
            merge_adapter(model.path, breaker.adapter_dir, target, chat_template=template)
    return target


def merge_adapter(
    model_dir: Path, adapter_dir: Path, out: Path, *, chat_template: Path | None = None
) -> None:
    """Write the checkpoint in `model_dir` with the LoRA in `adapter_dir` merged in, as `out`.

    `out` must not exist; it appears complete or not at all.

    Args:
        chat_template: file that takes the place of the model's own template.
    Raises:
        ArtifactError: the adapter does not fit the weights, or gives weights that are not finite.
        ModelError: the base checkpoint is incomplete or quantised.
    """
    if out.exists():
        raise ModelError(f"got {out}, which exists; expected a new directory; remove it first")
    base, dtype = _load_base_float32(model_dir)
    merged = _merge_float32(base, adapter_dir)

    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    merged.to(dtype).save_pretrained(temporary, safe_serialization=True)
    for source in sorted(model_dir.iterdir()):
        is_index = source.name.endswith(".index.json")
        if source.is_file() and source.suffix in _COPIED_SUFFIXES and not is_index:
            shutil.copyfile(source, temporary / source.name)
    if chat_template is not None:
        shutil.copyfile(chat_template, temporary / "chat_template.jinja")
    adapter_sha256 = _file_sha256(adapter_dir / "adapter_model.safetensors")
    (temporary / MERGE_MARKER).write_text(json.dumps({"adapter_sha256": adapter_sha256}), "utf-8")
    _flush(temporary)
    temporary.rename(out)


def check_mergeable(model_dir: Path) -> None:
    """Passes if an adapter can be merged into the checkpoint in `model_dir`.

    Raises:
        ModelError: its weights are quantised.
    """
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{model_dir} holds quantised weights; expected float16, bfloat16 or float32, as an "
            "adapter cannot be merged exactly into quantised weights; use the unquantised model"
        )


def _load_base_float32(model_dir: Path) -> tuple[Any, torch.dtype]:
    check_mergeable(model_dir)
    model, info = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ModelError(
            f"{model_dir} lacks weights or has wrong shapes: {lacking[:3]} ({len(lacking)} in "
            "all); expected a complete safetensors checkpoint; fetch the model again"
        )
    dtype: torch.dtype = model.dtype
    return model.float(), dtype


def _merge_float32(base: Any, adapter_dir: Path) -> Any:
    weights = adapter_dir / "adapter_model.safetensors"
    # Without this file peft would go on to look for a pickle.
    if not weights.is_file():
        raise ArtifactError(f"{weights} is missing; expected a PEFT LoRA adapter; export it again")
    kind = json.loads((adapter_dir / "adapter_config.json").read_text("utf-8")).get("peft_type")
    if kind != "LORA":
        raise ArtifactError(f"got peft_type {kind!r}, expected 'LORA'; train a LoRA adapter")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(adapter_dir), torch_device="cpu")
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"adapter {adapter_dir} does not fit the model: {error}; use the model it was made for"
        ) from error
    # peft only warns when tensors and modules do not pair up, which leaves the adapter partly dead.
    stored = load_file(weights)
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    strays = sorted(stored.keys() ^ placed.keys())
    if strays:
        raise ArtifactError(
            f"adapter {adapter_dir} and the model disagree about {strays[:3]} ({len(strays)} "
            "tensors in all); use the model it was made for, or export it again"
        )
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge found NaN or infinity
        raise ArtifactError(
            f"adapter {adapter_dir} gives weights that are not finite: {error}; train it again"
        ) from error


def merge_key(model: ResolvedModel, adapter_dir: Path, *, chat_template: Path | None = None) -> str:
    """Names what the merge of these two would be: any other weights have another key."""
    digest = hashlib.sha256()
    digest.update(f"{_FORMAT}\n{model.config_sha256}\n".encode())
    # The digest above leaves out dtype and tokenizer defaults, which the merged directory inherits.
    digest.update(f"config.json {_file_sha256(model.path / 'config.json')}\n".encode())
    digest.update(f"revision {model.revision}\n".encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update(f"{name} {_file_sha256(adapter_dir / name)}\n".encode())
    if chat_template is not None:
        digest.update(f"chat_template {_file_sha256(chat_template)}\n".encode())
    return digest.hexdigest()[:32]


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel drops when the process dies, however it dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(directory: Path) -> None:
    """Bring the files and the directory itself to disk, so that the rename cannot overtake them."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
