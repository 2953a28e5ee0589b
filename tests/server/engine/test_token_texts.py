"""Texts of single tokens add up to the text that vLLM gives out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from circuit_breakers.engine.token_texts import CompletionTexts, prompt_texts
from circuit_breakers.models import ResolvedModel

SENTENCE = "The capital of France is Paris."
BYTES = "Où? 🦓 日本"
"""Characters of two, four and three bytes, of which some take several tokens."""


@pytest.fixture(scope="module")
def tokenizer(smollm2: ResolvedModel) -> Any:
    return AutoTokenizer.from_pretrained(smollm2.path, local_files_only=True)


def texts(tokenizer: Any, text: str, **params: Any) -> CompletionTexts:
    prompt: list[int] = tokenizer("Say it.").input_ids
    completion = CompletionTexts(tokenizer, prompt, SamplingParams(**params))
    completion.feed(tokenizer(text).input_ids)
    return completion


def test_a_prompt_has_its_template(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": BYTES}], tokenize=False, add_generation_prompt=True
    )
    found = prompt_texts(tokenizer, tokenizer(whole).input_ids)
    assert "".join(found) == whole
    assert found[0] == "<|im_start|>"


@pytest.mark.parametrize("text", [SENTENCE, BYTES, f"Bye.<|im_end|>{BYTES}"])
def test_every_token_has_its_part(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    completion = texts(tokenizer, text)
    found = completion.release(has_ended=False)
    assert len(found) == len(ids)
    # Special tokens are not shown.
    assert "".join(map(str, found)) == text.replace("<|im_end|>", "")
    assert completion.release(has_ended=True) == []


def test_a_character_belongs_to_its_last_token(tokenizer: Any) -> None:
    ids = tokenizer("🦓").input_ids
    assert len(ids) > 1
    assert prompt_texts(tokenizer, ids) == [""] * (len(ids) - 1) + ["🦓"]


def test_text_that_may_become_a_stop_string_is_not_out_yet(tokenizer: Any) -> None:
    completion = texts(tokenizer, "The capital of France", stop=["France is"])
    # vLLM keeps as many characters back as the stop string has, less one: "f France".
    assert completion.release(has_ended=False) == ["The", " capital"]
    assert completion.release(has_ended=True) == [" of", " France"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        # Within a token, in a token of its own, and over two tokens of which one is out in part.
        ("nce", ["The", " capital", " of", " Fra"]),
        (" France", ["The", " capital", " of", None]),
        ("tal of", ["The", " capi", None]),
    ],
)
def test_a_stop_string_is_never_out(tokenizer: Any, stop: str, expected: list[Any]) -> None:
    ids = tokenizer("The capital of France").input_ids
    completion = CompletionTexts(tokenizer, (), SamplingParams(stop=[stop]))
    # The engine ends with the token that completes the stop string.
    completion.feed(ids[: len(expected)])
    assert completion.release(has_ended=True) == expected
