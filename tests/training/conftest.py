"""Tiny models and a tiny language, so that training runs for real in seconds.

The language has harmless words b0..b29 and harmful words h0..h29; a harmful conversation asks for
and answers with the latter.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from circuit_breakers.artifact import Aggregation
from circuit_breakers_training.data.dataset import SCHEMA_VERSION, write_dataset
from circuit_breakers_training.data.jsonl import Conversation, Label, Message
from circuit_breakers_training.recipes.config import (
    LoraRecipe,
    ObjectiveRecipe,
    ProbeRecipe,
    Recipe,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "please"]
    words += [f"{kind}{i}" for kind in "bh" for i in range(30)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=TEMPLATE,
    )


_SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 4,
    "eos_token_id": 4,
    "initializer_range": 0.2,
}


def _save(model: type[PreTrainedModel], config: PreTrainedConfig, path: Path) -> Path:
    """A random model, the same in every session, with a chat template."""
    torch.manual_seed(0)
    model(config).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks, width 32, with a chat template."""
    config = LlamaConfig(**_SIZES)
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of 4 blocks whose window of 8 tokens is shorter than conversations."""
    config = MistralConfig(**_SIZES, sliding_window=8)
    return _save(MistralForCausalLM, config, tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 4 blocks; queries and keys are normalised."""
    config = Qwen3Config(**_SIZES, head_dim=8)
    return _save(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of 4 blocks, sliding and full attention in turns."""
    config = Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=8,
        pad_token_id=4,
    )
    return _save(Gemma3ForCausalLM, config, tmp_path_factory.mktemp("tiny-gemma3"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 3 blocks, width 32; its linear layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=80,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=4,
        eos_token_id=4,
    )
    path = tmp_path_factory.mktemp("tiny-gpt2")
    GPT2LMHeadModel(config).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_gpt2(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 4 blocks with a context of 2048; as base models, without a template."""
    path = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(tiny_gpt2, path)
    (path / "chat_template.jinja").unlink()
    torch.manual_seed(0)
    config = GPT2Config.from_pretrained(
        tiny_gpt2,
        n_positions=2048,
        n_layer=4,
        # So large that a probe tells the words of the two labels apart.
        initializer_range=0.5,
        # Else it repeats the header's token, which ends a turn as well.
        tie_word_embeddings=False,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def make_conversations(label: Label, count: int, seed: int) -> list[Conversation]:
    rng = random.Random(seed)
    kind = "h" if label == "harmful" else "b"

    def words(low: int, high: int) -> str:
        return " ".join(f"{kind}{rng.randrange(30)}" for _ in range(rng.randint(low, high)))

    return [
        Conversation(
            messages=(
                Message("user", "please " + words(2, 4)),
                Message("assistant", words(4, 12)),
            ),
            label=label,
            source="odd" if i % 2 else "even",
            group=f"{label}-{seed}-{i}",
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def conversations() -> dict[str, list[Conversation]]:
    """Training rows and held-out rows of both labels."""
    return {
        "retain": make_conversations("benign", 120, 1),
        "harmful": make_conversations("harmful", 60, 2),
        "heldout_retain": make_conversations("benign", 12, 3),
        "heldout_harmful": make_conversations("harmful", 12, 4),
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in the tiny language."""
    splits = {
        name: make_conversations("benign", benign, seed)
        + make_conversations("harmful", harmful, seed + 1)
        for name, benign, harmful, seed in (
            ("train", 80, 60, 10),
            ("selection", 30, 20, 20),
            ("calibration", 70, 5, 30),
            ("test", 30, 20, 40),
        )
    }
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(path, splits, {"schema_version": SCHEMA_VERSION})
    return path


@pytest.fixture(scope="session")
def recipe(tiny_llama: Path) -> Recipe:
    """Makes a breaker for the tiny Llama out of that dataset."""
    return Recipe(
        model=str(tiny_llama),
        steps=20,
        batch_size=8,
        max_length=64,
        learning_rate=5e-3,
        precision="fp32",
        objective=ObjectiveRecipe(retain_weight=10.0),
        lora=LoraRecipe(rank=4, b_init_std=0.02),
        probe=ProbeRecipe(
            candidate_depths=(0.5, 0.75),
            aggregations=(Aggregation(kind="rolling_mean", window=4), Aggregation(kind="max")),
            l2_C=0.1,
            target_fpr=0.05,
            fpr_ladder=(0.1, 0.02),
            long_conversations=4,
        ),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal runs have equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
