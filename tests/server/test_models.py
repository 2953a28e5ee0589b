from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from circuit_breakers.errors import ModelError
from circuit_breakers.models import ResolvedModel, cache_dir, config_digest, resolve_model

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
