"""From the name of a base model to a local directory that can be loaded: built-in, directory, hub.

Only safetensors weights are accepted, and never a model that brings its own code. Importing this
module is light; torch and transformers load only while a built-in model is being converted
(builtin_models.py), huggingface_hub only for hub ids (hub_models.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit_breakers.artifact.manifest import BaseModelSpec
from circuit_breakers.builtin_models import BUILTIN_MODELS, cache_dir, converted_builtin
from circuit_breakers.errors import ModelError
from circuit_breakers.hub_models import hub_snapshot

__all__ = ["BUILTIN_MODELS", "ResolvedModel", "cache_dir", "config_digest", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Keys that name files, storage types or decoding defaults. They change from one save to the next
# and say nothing about the residual stream.
_VOLATILE_KEYS = frozenset(
    {
        "transformers_version",
        "name_or_path",
        "dtype",
        "torch_dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)
_NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A base model on the local disk, checked to be loadable without foreign code."""

    name: str
    """Built-in name, hub id, or the name of the local directory."""
    path: Path
    """Directory with config.json, safetensors weights and tokenizer."""
    revision: str
    """Hub commit, sha256 of a built-in model's source file, or of a local directory's weights."""
    config_sha256: str
    """config_digest of config.json."""
    num_layers: int
    hidden_size: int
    architecture: str
    """Class name that config.json gives, e.g. LlamaForCausalLM."""
    max_position_embeddings: int
    """Longest context in tokens."""

    def spec(self) -> BaseModelSpec:
        """What a breaker artifact records of its base model."""
        return BaseModelSpec(
            id=self.name,
            revision=self.revision,
            config_sha256=self.config_sha256,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
        )


def resolve_model(name: str, *, revision: str | None = None) -> ResolvedModel:
    """The model called `name`, as a checked local directory.

    Args:
        name: built-in name, path of a local directory, or hub id "org/model", tried in this order.
        revision: hub branch, tag or commit; hub ids only.
    Raises:
        ModelError: nothing is there, or it cannot be loaded safely; the message says the cure.
    """
    if name in BUILTIN_MODELS:
        pinned = BUILTIN_MODELS[name].sha256
        if revision not in (None, pinned):
            raise ModelError(
                f"got revision {revision!r} for built-in model {name!r}, expected {pinned!r}; "
                "leave --revision out"
            )
        return _inspect(converted_builtin(name), name=name, revision=pinned)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if revision is not None:
            raise ModelError(
                f"got revision {revision!r} for local directory {name!r}, expected none: "
                "only hub ids have revisions; leave --revision out"
            )
        path = path.resolve()
        return _inspect(path, name=path.name, revision=_weights_digest(path))
    if path.is_file():
        raise ModelError(
            f"got file {name!r}, expected a directory with config.json, safetensors weights and "
            "a tokenizer; pass the directory, or convert the file with transformers first"
        )
    if not name.startswith((".", "/", "~")) and _HUB_ID.fullmatch(name):
        snapshot = hub_snapshot(name, revision)
        return _inspect(snapshot, name=name, revision=snapshot.name)
    raise ModelError(_unknown_name(name))


def _weights_digest(directory: Path) -> str:
    """sha256 over the safetensors files of a directory: what a hub commit is to a hub id."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of the architecture-defining part of a parsed config.json, as 64 hex digits.

    Left out, at every depth: nulls, keys with a leading underscore, and _VOLATILE_KEYS. The older
    spelling of rotary embeddings (rope_theta, rope_scaling) counts as the newer rope_parameters.
    """
    canonical = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = _with_rope_parameters(value)
        return {
            key: _canonical(item)
            for key, item in value.items()
            if item is not None and not key.startswith("_") and key not in _VOLATILE_KEYS
        }
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    # 10000 and 10000.0 are the same rope_theta to every loader.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # A mapping with rope_type is itself a rope_parameters.
    if "rope_theta" not in config or "rope_parameters" in config or "rope_type" in config:
        return config
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default"})
    if "type" in scaling:  # the oldest spelling
        scaling.setdefault("rope_type", scaling.pop("type"))
    return rest | {"rope_parameters": {"rope_theta": config["rope_theta"], **scaling}}


def _inspect(path: Path, *, name: str, revision: str) -> ResolvedModel:
    """The model in directory `path`, after the checks that every source shares."""
    config = _read_json(path / "config.json", model=name)
    _refuse_custom_code(config, path / "config.json")
    _check_weights(path, name)
    tokenizer_files = [file for file in _TOKENIZER_FILES if (path / file).is_file()]
    if not tokenizer_files:
        raise ModelError(
            f"model {name!r}: no tokenizer in {path}, expected one of "
            f"{', '.join(_TOKENIZER_FILES)}; save it there with tokenizer.save_pretrained"
        )
    if (path / "tokenizer_config.json").is_file():
        tokenizer_config = _read_json(path / "tokenizer_config.json", model=name)
        _refuse_custom_code(tokenizer_config, path / "tokenizer_config.json")
    architectures = config.get("architectures")
    if not (
        isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    ):
        raise ModelError(
            f"{path / 'config.json'}: got architectures={architectures!r}, expected a list with "
            'the class name of a causal LM; add it, e.g. ["LlamaForCausalLM"]'
        )
    # Multimodal configs keep the language model's sizes one level down.
    nested = config.get("text_config")
    sizes = {**nested, **config} if isinstance(nested, dict) else config
    return ResolvedModel(
        name=name,
        path=path,
        revision=revision,
        config_sha256=config_digest(config),
        num_layers=_size(sizes, _NUM_LAYERS_KEYS, path, minimum=2),
        hidden_size=_size(sizes, _HIDDEN_SIZE_KEYS, path, minimum=1),
        architecture=architectures[0],
        max_position_embeddings=_size(sizes, _CONTEXT_KEYS, path, minimum=1),
    )


def _read_json(path: Path, *, model: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model {model!r}: no {path.name} in {path.parent}, expected a model saved by "
            "transformers' save_pretrained; check the path"
        ) from None
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot read {path} ({e}), expected a JSON object; save it again") from e
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: got a JSON {type(value).__name__}, expected an object; save it again"
        )
    return value


def _refuse_custom_code(config: Mapping[str, Any], path: Path) -> None:
    if config.get("auto_map"):
        raise ModelError(
            f"{path}: got auto_map={config['auto_map']!r}, i.e. a model that brings its own Python "
            "code, expected an architecture that transformers and vLLM implement; if they do, "
            "load it there once without trust_remote_code and save_pretrained a copy"
        )


def _check_weights(path: Path, name: str) -> None:
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        got = f"only {', '.join(pickles)}" if pickles else "no weights"
        raise ModelError(
            f"model {name!r}: got {got} in {path}, expected *.safetensors (pickle files are never "
            "loaded); convert them with save_pretrained, or pick a safetensors revision"
        )
    for index in path.glob("*.safetensors.index.json"):
        weight_map = _read_json(index, model=name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: got no weight_map, expected one; copy the model again")
        missing = sorted(str(f) for f in set(weight_map.values()) if not (path / str(f)).is_file())
        if missing:
            raise ModelError(
                f"model {name!r}: {len(missing)} weight files of {index.name} are not in {path}, "
                f"the first is {missing[0]}; copy or download the model again"
            )


def _size(sizes: Mapping[str, Any], keys: tuple[str, ...], path: Path, *, minimum: int) -> int:
    for key in keys:
        value = sizes.get(key)
        if value is not None:
            if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
                return value
            raise ModelError(
                f"{path / 'config.json'}: got {key}={value!r}, expected a whole number of at "
                f"least {minimum}; correct the config"
            )
    raise ModelError(
        f"{path / 'config.json'}: got none of {', '.join(keys)}, expected one; "
        "is this a decoder-only language model?"
    )


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), BUILTIN_MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "check the name"
    return (
        f"got model {name!r}, expected a built-in name ({_builtin_names()}), an existing "
        f"directory, or a hub id 'org/model'; {hint}"
    )


def _builtin_names() -> str:
    return ", ".join(sorted(BUILTIN_MODELS))
