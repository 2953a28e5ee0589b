from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from circuit_breakers.artifact import Breaker, ProbeWeights, load_breaker, save_breaker
from circuit_breakers.errors import ArtifactError

Forge = Callable[[str, bytes], Path]

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
LORA_A = f"{MODULE}.lora_A.weight"
LORA_B = f"{MODULE}.lora_B.weight"


def probes(**changed: Any) -> bytes:
    tensors = {
        "layer1.weight": np.ones(8, np.float32),
        "layer1.bias": np.zeros((), np.float32),
        "layer2.weight": np.ones(8, np.float32),
        "layer2.bias": np.zeros((), np.float32),
    }
    tensors.update(changed)
    return save({k: v for k, v in tensors.items() if v is not None})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (probes(**{"layer1.weight": np.ones(9, np.float32)}), r"got F32 \[9\], expected F32 \[8\]"),
        (probes(**{"layer1.weight": np.ones((8, 1), np.float32)}), r"got F32 \[8, 1\]"),
        (probes(**{"layer1.weight": np.ones(8, np.float16)}), r"got F16 \[8\]"),
        (probes(**{"layer1.bias": np.zeros(1, np.float32)}), r"got F32 \[1\], expected F32 \[\]"),
        (probes(**{"layer2.weight": np.full(8, np.nan, np.float32)}), "NaN or infinite weights"),
        (probes(**{"layer2.bias": np.asarray(np.inf, np.float32)}), "NaN or infinite weights"),
        (probes(**{"layer2.bias": None}), "got tensors .* expected"),
        (probes(**{"layer3.bias": np.zeros((), np.float32)}), "got tensors .* expected"),
        (probes()[:-4], "not safetensors"),
        (b"", "not safetensors"),
    ],
)
def test_refuses_bad_probe_tensors(data: bytes, message: str, forge: Forge) -> None:
    with pytest.raises(ArtifactError, match=rf"probes\.safetensors.*{message}"):
        load_breaker(forge("probes.safetensors", data))


def two_layers(parts: dict[str, Any], weight_LD: Any) -> dict[str, Any]:
    """Arguments of save_breaker with a first probe that reads layers 0 and 2."""
    first = parts["probes"][0].model_copy(update={"layer": None, "layers": (0, 2)})
    parts["probes"] = [first, *parts["probes"][1:]]
    parts["weights"]["layer1"] = ProbeWeights(weight_LD, 0.5)
    return parts


def test_several_layers_have_a_row_each(parts: dict[str, Any], tmp_path: Path) -> None:
    weight_LD = np.arange(16, dtype=np.float32).reshape(2, 8)
    saved = save_breaker(tmp_path / "new", **two_layers(parts, weight_LD))
    breaker = load_breaker(saved.path)
    assert breaker.manifest.probes[0].read_layers == (0, 2)
    assert np.array_equal(breaker.weights["layer1"].weight_D, weight_LD)
    assert np.array_equal(breaker.weights["layer1"].weight_LD, weight_LD)
    assert breaker.weights["layer1"].bias == 0.5
    # One layer is a row too.
    assert breaker.weights["layer2"].weight_LD.shape == (1, 8)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert "layer" not in manifest["probes"][0]
    assert "layers" not in manifest["probes"][1]


@pytest.mark.parametrize(
    ("weight_LD", "message"),
    [
        (np.ones(16, np.float32), r"got float32 \(16,\), expected float32 \(2, 8\)"),
        (np.ones((3, 8), np.float32), r"got float32 \(3, 8\), expected float32 \(2, 8\)"),
        (np.ones((8, 2), np.float32), r"got float32 \(8, 2\)"),
        (np.full((2, 8), np.nan, np.float32), "NaN or infinite weights"),
    ],
)
def test_refuses_weights_that_do_not_fit_the_layers(
    weight_LD: Any, message: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        save_breaker(tmp_path / "new", **two_layers(parts, weight_LD))


def test_refuses_a_file_with_fewer_rows_than_layers(
    parts: dict[str, Any], tmp_path: Path, forge: Forge
) -> None:
    breaker_dir = forge("probes.safetensors", probes())
    manifest = json.loads((breaker_dir / "manifest.json").read_text())
    del manifest["probes"][0]["layer"]
    manifest["probes"][0]["layers"] = [0, 2]
    (breaker_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"got F32 \[8\], expected F32 \[2, 8\]"):
        load_breaker(breaker_dir)


def test_probe_weights_are_read_only(saved: Breaker) -> None:
    weight_D = load_breaker(saved.path).weights["layer1"].weight_D
    with pytest.raises(ValueError, match="read-only"):
        weight_D[0] = 1.0


def adapter(dtype: type = np.float32, **changed: Any) -> bytes:
    tensors = {LORA_A: np.ones((2, 8), dtype), LORA_B: np.ones((8, 2), dtype)}
    tensors.update(changed)
    return save({k: v for k, v in tensors.items() if v is not None})


def bfloat16_adapter(bits: int) -> bytes:
    """An adapter of bfloat16 values with the given bit pattern, by the layout of the format."""
    header = json.dumps(
        {
            LORA_A: {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
            LORA_B: {"dtype": "BF16", "shape": [8, 2], "data_offsets": [32, 64]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + np.full(32, bits, "<u2").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (adapter(**{LORA_A: np.full((2, 8), np.nan, np.float32)}), "NaN or infinite weights"),
        (adapter(np.float16, **{LORA_B: np.full((8, 2), np.inf, np.float16)}), "NaN or infinite"),
        (adapter(np.float64), "got dtype F64, expected F32, F16 or BF16"),
        (adapter(np.int32), "got dtype I32"),
        (adapter(**{LORA_B: np.ones((8, 3), np.float32)}), "got ranks"),
        (adapter(**{LORA_B: None}), "got ranks"),
        (adapter(**{LORA_A: np.ones(8, np.float32)}), "expected only 2-dimensional"),
        (adapter(**{f"{MODULE}.weight": np.ones((8, 8), np.float32)}), "expected only"),
        (adapter(**{LORA_A: None, LORA_B: None}), "got no tensors"),
        (b"PK\x03\x04 a pickle in a zip", "not safetensors"),
    ],
)
def test_refuses_bad_adapter_tensors(data: bytes, message: str, forge: Forge) -> None:
    with pytest.raises(ArtifactError, match=rf"adapter_model\.safetensors.*{message}"):
        load_breaker(forge("adapter/adapter_model.safetensors", data))


def test_accepts_half_precision_adapter(forge: Forge) -> None:
    load_breaker(forge("adapter/adapter_model.safetensors", adapter(np.float16)))


@pytest.mark.parametrize("bits", [0x0000, 0x3F80, 0x7F7F, 0xFF7F])  # 0, 1, largest, -largest
def test_accepts_finite_bfloat16_adapter(bits: int, forge: Forge) -> None:
    data = bfloat16_adapter(bits)
    load_breaker(forge("adapter/adapter_model.safetensors", data))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])  # inf, -inf, quiet NaN, NaN
def test_refuses_non_finite_bfloat16_adapter(bits: int, forge: Forge) -> None:
    data = bfloat16_adapter(bits)
    with pytest.raises(ArtifactError, match="NaN or infinite weights"):
        load_breaker(forge("adapter/adapter_model.safetensors", data))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"not json", "got invalid JSON"),
        (b"[]", "got peft_type None, expected 'LORA'"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is beyond a float"),
        (b'{"peft_type": "LORA", "r": 1, "r": 2}', "duplicate key 'r'"),
        (b'{"peft_type": "LORA", "target_modules": [1, "q_proj"]}', "expected names"),
        (json.dumps({"peft_type": "IA3"}).encode(), "got peft_type 'IA3', expected 'LORA'"),
        (
            json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}).encode(),
            "names code to import",
        ),
    ],
)
def test_refuses_bad_adapter_config(config: bytes, message: str, forge: Forge) -> None:
    with pytest.raises(ArtifactError, match=rf"adapter_config\.json: .*{message}"):
        load_breaker(forge("adapter/adapter_config.json", config))
