"""The streamed residual stream against transformers' own hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from circuit_breakers_training.probe.activations import ResidualReader
from circuit_breakers_training.render import Rendered


def _rows(lengths: list[int], seed: int = 0) -> list[Rendered]:
    rng = np.random.default_rng(seed)
    return [
        Rendered(ids=tuple(rng.integers(0, 50, n).tolist()), num_prompt_tokens=n // 2)
        for n in lengths
    ]


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    )


@pytest.fixture(params=[_llama, _gpt2], ids=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_rows_equal_hidden_states_of_the_layer_above(model_dir: Path) -> None:
    rows = _rows([5, 17, 9, 30, 1])
    reader = ResidualReader(model_dir, [0, 2])
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    seen = set()
    for index, hidden_TLD in reader.read(rows):
        seen.add(index)
        with torch.no_grad():
            hidden = model(torch.tensor([rows[index].ids]), output_hidden_states=True).hidden_states
        assert hidden_TLD.shape == (len(rows[index].ids), 2, 32)
        for at, layer in enumerate((0, 2)):
            expected = hidden[layer + 1][0].numpy()
            # float32 rounding of products summed in another order; measured 1e-6.
            np.testing.assert_allclose(hidden_TLD[:, at], expected, atol=2e-5)
    assert seen == set(range(len(rows)))


def test_neighbours_in_a_batch_do_not_change_a_row(model_dir: Path) -> None:
    rows = _rows([6, 40, 23])
    reader = ResidualReader(model_dir, [1])
    together = dict(list(reader.read(rows)))
    for index, row in enumerate(rows):
        ((_, alone),) = reader.read([row])
        np.testing.assert_allclose(together[index], alone, atol=2e-5)


def test_blocks_above_the_deepest_probe_are_gone(model_dir: Path) -> None:
    reader = ResidualReader(model_dir, [1, 0])
    parameters = sum(p.numel() for p in reader._model.parameters())
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_dir).parameters())
    assert parameters < whole
    assert reader._model.config.num_hidden_layers == 2


def test_reads_states_in_the_type_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    _llama().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, is_rounded in (("auto", True), ("float32", False)):
        monkeypatch.setattr(
            "circuit_breakers_training.probe.activations.quick_dtype", lambda dtype=dtype: dtype
        )
        ((_, hidden_TLD),) = ResidualReader(tmp_path, [1]).read(_rows([8]))
        assert hidden_TLD.dtype == np.float32
        rounded = torch.from_numpy(hidden_TLD).to(torch.bfloat16).float().numpy()
        assert np.array_equal(hidden_TLD, rounded) == is_rounded


def test_progress_counts_every_conversation(model_dir: Path) -> None:
    done: list[int] = []
    list(ResidualReader(model_dir, [1]).read(_rows([50] * 100), progress=done.append))
    assert sum(done) == 100
    assert len(done) > 1
