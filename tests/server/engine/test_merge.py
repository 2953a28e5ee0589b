"""Merged checkpoints against W + (alpha / r) B A in numpy, and what must never be served."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from circuit_breakers.artifact.manifest import (
    Aggregation,
    Calibration,
    Canary,
    Message,
    ProbeSpec,
)
from circuit_breakers.artifact.store import Breaker, save_breaker
from circuit_breakers.artifact.tensors import ProbeWeights
from circuit_breakers.engine.launch import guard_arguments
from circuit_breakers.engine.merge import merge_adapter, merged_checkpoint
from circuit_breakers.errors import (
    ArtifactError,
    BreakerMismatchError,
    ConfigError,
    ModelError,
)
from circuit_breakers.models import ResolvedModel, resolve_model

WIDTH = 32
LAYERS = 3


def _write_model(path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def _write_adapter(path: Path, model_dir: Path, scale: float = 0.05, width_rank: int = 2) -> Path:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapted = get_peft_model(
        base,
        LoraConfig(
            r=width_rank,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[0, 1],
            task_type="CAUSAL_LM",
        ),
    )
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    adapted.save_pretrained(path)
    return path


def _write_breaker(
    path: Path, model: ResolvedModel, adapter_dir: Path, template: bytes | None = None
) -> Breaker:
    calibration = Calibration(
        target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
    )
    spec = ProbeSpec(
        name="layer1",
        layer=1,
        aggregation=Aggregation(kind="max"),
        threshold_logit=1.0,
        calibration=calibration,
    )
    return save_breaker(
        path,
        name="tiny",
        base_model=model.spec(),
        recipe={},
        data_sha256={},
        probes=[spec],
        weights={"layer1": ProbeWeights(np.ones(WIDTH, np.float32), 0.0)},
        adapter_dir=adapter_dir,
        canaries=[
            Canary(messages=(Message(role="user", content="harm"),), label="harmful"),
            Canary(messages=(Message(role="user", content="hello"),), label="benign"),
        ],
        extra_files={} if template is None else {"chat_template.jinja": template},
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return _write_model(tmp_path / "model")


@pytest.fixture
def adapter_dir(tmp_path: Path, model_dir: Path) -> Path:
    return _write_adapter(tmp_path / "adapter", model_dir)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIRCUIT_BREAKERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_merges_in_float32_and_rounds_once(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    base = load_file(model_dir / "model.safetensors")
    lora = load_file(adapter_dir / "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = set()
    for name, weight in base.items():
        assert merged[name].dtype == torch.bfloat16
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{prefix}.lora_A.weight" in lora:
            delta = lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"] * (8 / 2)
            expected = (weight.float() + delta).to(torch.bfloat16)
            changed.add(name)
        assert torch.equal(merged[name], expected), name
    assert len(changed) == 4  # two modules in two blocks


def test_config_and_tokenizer_are_those_of_the_base(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (model_dir / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_leftover_of_a_killed_merge_is_replaced(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    leftover = tmp_path / ".merged.tmp"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"torn")
    merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    assert not leftover.exists()
    assert not (tmp_path / "merged" / "model-00001-of-00002.safetensors").exists()


def test_refuses_to_write_over_a_directory(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="expected a new directory"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_refuses_an_adapter_with_a_tensor_that_has_no_place(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, WIDTH)
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"disagree about .*layers\.9"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_refuses_an_adapter_that_lacks_a_tensor(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"disagree about .*\(1 tensors"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_refuses_an_adapter_of_another_width(tmp_path: Path, model_dir: Path) -> None:
    adapter_dir = _write_adapter(tmp_path / "adapter", model_dir)
    file = adapter_dir / "adapter_model.safetensors"
    save_file({k: v.repeat(1, 2) for k, v in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match="does not fit the model"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_refuses_weights_that_are_not_finite(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="not finite"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_never_falls_back_to_a_pickled_adapter(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    file = adapter_dir / "adapter_model.safetensors"
    torch.save(load_file(file), adapter_dir / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_refuses_a_base_with_missing_weights(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.2"):
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")


def test_second_call_is_the_cached_directory(
    tmp_path: Path, model_dir: Path, adapter_dir: Path, cache: Path
) -> None:
    model = resolve_model(str(model_dir))
    breaker = _write_breaker(tmp_path / "breaker", model, adapter_dir)
    first = merged_checkpoint(model, breaker)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert first.is_relative_to(cache)
    assert merged_checkpoint(model, breaker) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_other_weights_or_another_adapter_never_meet_an_old_merge(
    tmp_path: Path, model_dir: Path, adapter_dir: Path, cache: Path
) -> None:
    model = resolve_model(str(model_dir))
    first = merged_checkpoint(model, _write_breaker(tmp_path / "b1", model, adapter_dir))
    other_adapter = _write_adapter(tmp_path / "adapter2", model_dir, scale=0.1)
    second = merged_checkpoint(model, _write_breaker(tmp_path / "b2", model, other_adapter))
    other_model = resolve_model(str(_write_model(tmp_path / "other" / model_dir.name, seed=1)))
    third = merged_checkpoint(
        other_model, _write_breaker(tmp_path / "b3", other_model, adapter_dir)
    )
    assert len({first, second, third}) == 3


def test_a_template_of_the_breaker_takes_the_place_of_the_models(
    tmp_path: Path, model_dir: Path, adapter_dir: Path, cache: Path
) -> None:
    model = resolve_model(str(model_dir))
    own = _write_breaker(tmp_path / "b1", model, adapter_dir)
    other = _write_breaker(tmp_path / "b2", model, adapter_dir, template=b"{{ bos_token }}")
    paths = [merged_checkpoint(model, breaker) for breaker in (own, other)]
    assert [(path / "chat_template.jinja").read_text() for path in paths] == [
        "{{ messages }}",
        "{{ bos_token }}",
    ]
    # The weights are the same, the directories are not.
    assert own.chat_template is None
    assert paths[0] != paths[1]


def test_a_template_of_the_breaker_is_not_left_out(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    model = resolve_model(str(model_dir))
    breaker = _write_breaker(tmp_path / "b", model, adapter_dir, template=b"{{ bos_token }}")
    with pytest.raises(ConfigError, match="chat template of its own, expected 'merged'"):
        guard_arguments(model, breaker, mode="enforce", adapter="dynamic")


def test_refuses_a_breaker_of_another_model(
    tmp_path: Path, model_dir: Path, adapter_dir: Path, cache: Path
) -> None:
    model = resolve_model(str(model_dir))
    breaker = _write_breaker(tmp_path / "breaker", model, adapter_dir)
    with pytest.raises(BreakerMismatchError):
        merged_checkpoint(replace(model, config_sha256="0" * 64), breaker)


_RACER = """
import sys, pathlib
sys.path[:0] = sys.argv[3:]
from circuit_breakers.artifact.store import load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.models import resolve_model
model_dir, breaker_dir = map(pathlib.Path, sys.argv[1:3])
print(merged_checkpoint(resolve_model(str(model_dir)), load_breaker(breaker_dir)))
"""


def test_two_processes_share_one_merge(
    tmp_path: Path, model_dir: Path, adapter_dir: Path, cache: Path
) -> None:
    model = resolve_model(str(model_dir))
    breaker = _write_breaker(tmp_path / "breaker", model, adapter_dir)
    here = str(Path(__file__).parent)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(model_dir), str(breaker.path), here],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = {racer.communicate(timeout=120)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(printed) == 1
    kept = [p.name for p in (cache / "merged").iterdir() if p.suffix != ".lock"]
    assert kept == [Path(printed.pop()).name]
