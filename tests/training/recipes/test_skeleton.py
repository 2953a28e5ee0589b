from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from circuit_breakers.errors import ModelError
from circuit_breakers.models import ResolvedModel
from circuit_breakers_training.recipes.skeleton import (
    count_parameters,
    has_chat_template,
    local_model_dir,
    model_skeleton,
)


def test_a_skeleton_has_the_shapes_of_the_model_and_no_memory(tiny_llama: Path) -> None:
    skeleton = model_skeleton(tiny_llama, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_only_the_config_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert count_parameters(tmp_path) == count_parameters(tiny_llama)


def test_shared_weights_count_once(smollm2: ResolvedModel, tmp_path: Path) -> None:
    # 134.5M is the model card's number; its head is the embedding.
    assert count_parameters(smollm2.path) == 134_515_008
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    # Llama-3-8B, whose safetensors index says 16,060,522,496 bytes of bfloat16.
    assert count_parameters(tmp_path) == 16_060_522_496 // 2


def test_a_chat_template_is_there_or_not(tiny_llama: Path, tmp_path: Path) -> None:
    assert has_chat_template(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert not has_chat_template(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected config\.json of a causal language model"):
        count_parameters(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="no-such-type"):
        count_parameters(tmp_path)
    with pytest.raises(ModelError, match="save it there with tokenizer"):
        has_chat_template(tmp_path)


def test_a_model_is_found_without_downloading(
    smollm2: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_model_dir("smollm2-135m-instruct") == smollm2.path
    assert local_model_dir(str(tmp_path)) == tmp_path
    for name in ("some/model-that-is-not-cached", "no-such-model", "not a name"):
        with pytest.raises(ModelError, match="is not on this machine"):
            local_model_dir(name)


def test_a_cached_hub_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layout of the hub's cache: models--ORG--NAME/refs/BRANCH and snapshots/COMMIT.
    commit = "0" * 40
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_model_dir("some/model") == snapshot
