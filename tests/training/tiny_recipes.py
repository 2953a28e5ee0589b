"""Recipes that reroute the tiny models of conftest.py in seconds."""

from __future__ import annotations

from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import LoraRecipe, ObjectiveRecipe, Recipe

__all__ = ["GPT2", "LLAMA", "Conversations"]

Conversations = dict[str, list[Conversation]]

LLAMA = Recipe(
    model="tiny-llama",
    steps=60,
    batch_size=8,
    max_length=64,
    learning_rate=5e-3,
    precision="fp32",
    objective=ObjectiveRecipe(retain_weight=10.0),
    lora=LoraRecipe(rank=8, b_init_std=0.02),
)
GPT2 = LLAMA.model_copy(
    update={
        "model": "tiny-gpt2",
        "lora": LoraRecipe(rank=8, b_init_std=0.02, target_modules=("c_attn", "c_proj", "c_fc")),
    }
)
