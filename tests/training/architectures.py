"""Tiny random models of every architecture that packed rows are checked on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from circuit_breakers_training.render import Rendered

VOCAB = 80
_WINDOW = 6
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 4,
    "eos_token_id": 4,
    "pad_token_id": 4,
}


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=4,
            eos_token_id=4,
        )
    )


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    # A scale of attention that the head width does not give, and different embeddings by kind.
    config = Gemma3TextConfig(
        **_COMMON, sliding_window=_WINDOW, layer_types=kinds, query_pre_attn_scalar=20
    )
    return Gemma3ForCausalLM(config)


def _gemma2() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**_COMMON, attn_logit_softcapping=5.0))


def _bloom() -> Any:
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.2)
    )


PACKED = {
    "gpt2": _gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=_WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON)),
    "gemma3": _gemma3,
}
"""Windows are shorter than most rows of `random_rows`."""
PADDED = {"bloom": _bloom, "gemma2": _gemma2}
"""Positions in the attention scores, and scores that are squashed."""


def write_model(architecture: str, directory: Path) -> Path:
    torch.manual_seed(0)
    {**PACKED, **PADDED}[architecture]().save_pretrained(directory)
    return directory


def random_rows(count: int, seed: int, *, longest: int = 40) -> list[Rendered]:
    """Rows of 5 to `longest` tokens, of which 2 to 4 are the prompt."""
    rng = random.Random(seed)
    return [
        Rendered(
            ids=tuple(rng.randrange(5, VOCAB) for _ in range(rng.randint(5, longest))),
            num_prompt_tokens=rng.randint(2, 4),
        )
        for _ in range(count)
    ]
