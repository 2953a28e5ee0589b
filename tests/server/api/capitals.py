"""Questions whose answers are foreseen, and how to ask them by the OpenAI client.

Asked for one sentence, the model says with a margin "The capital of France is Paris." and "The
capital of Italy is Rome."; " Paris" and " zebra" are the words that trip (breaker_for_words.py).
"""

from __future__ import annotations

from typing import Any

from .conftest import MODEL, Server, user

__all__ = ["BEFORE_PARIS", "FRANCE", "ITALY", "ROME", "ZEBRA", "chat", "complete"]

FRANCE = "Tell me the capital of France in one sentence."
ITALY = "Tell me the capital of Italy in one sentence."
ROME = "The capital of Italy is Rome."
BEFORE_PARIS = "The capital of France is"
ZEBRA = "Do you like the zebra?"


def chat(server: Server, text: str, **more: Any) -> Any:
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 32} | more
    return server.openai.chat.completions.create(messages=user(text), **fields)


def complete(server: Server, prompt: Any, **more: Any) -> Any:
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 6} | more
    return server.openai.completions.create(prompt=prompt, **fields)
