"""Safetensors bytes of an artifact to checked values: probe weights, and the adapter's soundness.

Shapes: D model width, L layers of one probe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from circuit_breakers.artifact.manifest import BaseModelSpec, ProbeSpec
from circuit_breakers.artifact.strict_json import load_json
from circuit_breakers.errors import ArtifactError

__all__ = [
    "ProbeWeights",
    "check_adapter_tensors",
    "check_probe_weights",
    "normalised_adapter_config",
    "parse_adapter_config",
    "probes_from_safetensors",
    "probes_to_safetensors",
]

_AGAIN = "export the breaker again"
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class ProbeWeights(NamedTuple):
    """Weights of one linear probe; logit = sum over its layers of hidden_D @ weight_D, + bias."""

    weight_D: npt.NDArray[np.float32]
    """float32 (D,), with the standardisation of training folded in; (L, D) for several layers."""
    bias: float

    @property
    def weight_LD(self) -> npt.NDArray[np.float32]:
        """A row for each layer, also where there is one."""
        return np.atleast_2d(self.weight_D)


def probes_to_safetensors(weights: Mapping[str, ProbeWeights]) -> bytes:
    """probes.safetensors: float32 "<name>.weight" (D,) or (L, D) and "<name>.bias" ()."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(weights):
        tensors[f"{name}.weight"] = np.ascontiguousarray(weights[name].weight_D)
        tensors[f"{name}.bias"] = np.asarray(weights[name].bias, np.float32)
    return bytes(save(tensors))


def probes_from_safetensors(
    data: bytes, probes: Sequence[ProbeSpec], hidden_size: int, where: str
) -> dict[str, ProbeWeights]:
    """Weights by probe name, in the manifest's order; the arrays are read-only.

    Raises:
        ArtifactError: tensors are missing, unknown, of another shape or dtype, or not finite.
    """
    tensors = _tensors(data, where)
    shapes: dict[str, tuple[int, ...]] = {}
    for p in probes:
        shapes |= {f"{p.name}.weight": _weight_shape(p, hidden_size), f"{p.name}.bias": ()}
    if set(tensors) != set(shapes):
        raise ArtifactError(
            f"{where}: got tensors {sorted(tensors)}, expected {sorted(shapes)} as the manifest's "
            f"probes say; {_AGAIN}"
        )
    for key, tensor in tensors.items():
        shape = list(shapes[key])
        if tensor["dtype"] != "F32" or list(tensor["shape"]) != shape:
            raise ArtifactError(
                f"{where}: tensor {key!r}: got {tensor['dtype']} {list(tensor['shape'])}, expected "
                f"F32 {shape}; {_AGAIN}"
            )
    weights = {
        p.name: ProbeWeights(
            weight_D=np.frombuffer(bytes(tensors[f"{p.name}.weight"]["data"]), "<f4").reshape(
                shapes[f"{p.name}.weight"]
            ),
            bias=float(np.frombuffer(tensors[f"{p.name}.bias"]["data"], "<f4")[0]),
        )
        for p in probes
    }
    check_probe_weights(weights, probes, hidden_size, where)
    return weights


def check_probe_weights(
    weights: Mapping[str, ProbeWeights], probes: Sequence[ProbeSpec], hidden_size: int, where: str
) -> None:
    """Raise ArtifactError unless each probe has finite float32 weights and a finite bias.

    Weights are (D,) for a probe of one layer, (L, D) for one of L layers.
    """
    if set(weights) != {p.name for p in probes}:
        raise ArtifactError(
            f"{where}: got weights for {sorted(weights)}, expected one for each probe: "
            f"{sorted(p.name for p in probes)}; pass the weights of the same probes"
        )
    for p in probes:
        name, (weight_D, bias) = p.name, weights[p.name]
        shape = _weight_shape(p, hidden_size)
        if weight_D.dtype != np.float32 or weight_D.shape != shape:
            raise ArtifactError(
                f"{where}: probe {name!r}: got {weight_D.dtype} {weight_D.shape}, expected float32 "
                f"{shape}, by its layers and the width of the base model; {_AGAIN}"
            )
        # A bias beyond float32 becomes infinite when it is stored.
        if not np.isfinite(weight_D).all() or not abs(bias) <= _FLOAT32_MAX:
            raise ArtifactError(
                f"{where}: probe {name!r}: got NaN or infinite weights, expected finite numbers; "
                "fit the probe again, its training has diverged"
            )


def _weight_shape(probe: ProbeSpec, hidden_size: int) -> tuple[int, ...]:
    num_layers = len(probe.read_layers)
    return (hidden_size,) if num_layers == 1 else (num_layers, hidden_size)


def check_adapter_tensors(data: bytes, where: str) -> None:
    """Raise ArtifactError unless `data` is a LoRA adapter: finite lora_A and lora_B in pairs."""
    tensors = _tensors(data, where)
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        shape = list(tensor["shape"])
        if part not in ("lora_A", "lora_B") or not key.endswith(".weight") or len(shape) != 2:
            raise ArtifactError(
                f"{where}: got tensor {key!r} {shape}, expected only 2-dimensional "
                f"'<module>.lora_A.weight' and '<module>.lora_B.weight'; train a plain LoRA adapter"
            )
        ranks.setdefault(module, {})[part] = shape[0] if part == "lora_A" else shape[1]
        if not _is_finite(tensor, key, where):
            raise ArtifactError(
                f"{where}: tensor {key!r}: got NaN or infinite weights, expected finite numbers; "
                "train the adapter again with a lower learning rate"
            )
    for module, rank in ranks.items():
        if rank.get("lora_A") != rank.get("lora_B"):
            raise ArtifactError(
                f"{where}: module {module!r}: got ranks {rank}, expected lora_A and lora_B of one "
                f"rank; {_AGAIN}"
            )
    if not ranks:
        raise ArtifactError(f"{where}: got no tensors, expected a LoRA adapter; {_AGAIN}")


def parse_adapter_config(data: bytes, where: str) -> dict[str, Any]:
    """adapter_config.json as a dictionary.

    Raises:
        ArtifactError: not JSON, not LoRA, it names code to import, or modules by no name.
    """
    try:
        config = load_json(data)
    except ValueError as e:
        raise ArtifactError(f"{where}: got invalid JSON ({e}), expected PEFT's; {_AGAIN}") from e
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "LORA":
        raise ArtifactError(
            f"{where}: got peft_type {peft_type!r}, expected 'LORA', which both peft and vLLM "
            "load; train a LoRA adapter"
        )
    assert isinstance(config, dict)
    if config.get("auto_mapping"):
        raise ArtifactError(
            f"{where}: got auto_mapping={config['auto_mapping']!r}, which names code to import, "
            "expected null; train with task_type='CAUSAL_LM'"
        )
    modules = config.get("target_modules")
    if isinstance(modules, list) and not all(isinstance(name, str) for name in modules):
        raise ArtifactError(
            f"{where}: got target_modules={modules!r}, expected names; train a plain LoRA adapter"
        )
    return config


def normalised_adapter_config(config: Mapping[str, Any], base_model: BaseModelSpec) -> bytes:
    """adapter_config.json with the base model's id and no trace of the machine or of set order."""
    result = dict(config)
    result["base_model_name_or_path"] = base_model.id
    result["revision"] = None
    result["inference_mode"] = True
    modules = result.get("target_modules")
    if isinstance(modules, list):  # PEFT keeps a set, so its order changes from run to run
        result["target_modules"] = sorted(modules)
    return json.dumps(result, indent=2, sort_keys=True).encode() + b"\n"


def _tensors(data: bytes, where: str) -> dict[str, dict[str, Any]]:
    """{name: {"dtype", "shape", "data"}} of safetensors bytes, any dtype."""
    try:
        return dict(deserialize(data))  # type: ignore[no-untyped-call]  # a Rust function
    except SafetensorError as e:
        raise ArtifactError(
            f"{where}: got bytes that are not safetensors ({e}); copy or export the breaker again"
        ) from e


def _is_finite(tensor: Mapping[str, Any], key: str, where: str) -> bool:
    data, dtype = tensor["data"], tensor["dtype"]
    if dtype == "BF16":
        # numpy has no bfloat16: NaN and infinity are those with all 8 exponent bits set.
        return not bool(np.any(np.frombuffer(data, "<u2") & 0x7F80 == 0x7F80))
    if dtype in ("F32", "F16"):
        return bool(np.isfinite(np.frombuffer(data, "<f4" if dtype == "F32" else "<f2")).all())
    raise ArtifactError(
        f"{where}: tensor {key!r}: got dtype {dtype}, expected F32, F16 or BF16; save the adapter "
        "in one of them"
    )
