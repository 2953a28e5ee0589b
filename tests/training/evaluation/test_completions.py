"""What the tiny model writes, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers.errors import ConfigError, ModelError
from circuit_breakers.models import resolve_model
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.evaluation.completions import (
    Completion,
    Sampling,
    check_lengths,
    prompt_ids,
    render_attempts,
    write_completions,
)
from circuit_breakers_training.evaluation.prompts import EvalPrompt
from circuit_breakers_training.evaluation.suites import Attempt
from circuit_breakers_training.render import TemplateSource

GREEDY = Sampling(max_new_tokens=6, temperature=0.0, seed=0, backend="transformers")


def _attempt(text: str) -> Attempt:
    messages = (Message("user", text),)
    prompt = EvalPrompt(messages=messages, label="benign", source="s")
    return Attempt(suite="direct", technique="as-is", prompt=prompt, messages=messages)


def _written(
    model_dir: Path, prompts: Sequence[tuple[int, ...]], sampling: Sampling
) -> list[Completion]:
    return write_completions(
        model_dir,
        "tiny",
        prompts,
        sampling,
        chat_template="model",
        max_model_len=64,
        title="test",
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_first_words_follow_the_assistants_header(tokenizer: Any) -> None:
    plain = _attempt("please b1 b2")
    begun = replace(plain, prefill="b3 b4")
    text = "<|user|> please b1 b2 <|end|> <|assistant|>"
    assert prompt_ids(tokenizer, plain) == tuple(tokenizer(text)["input_ids"])
    assert prompt_ids(tokenizer, begun) == tuple(tokenizer(text + " b3 b4")["input_ids"])


def test_attempts_are_rendered_by_the_template_that_is_given(
    base_gpt2: Path, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("b0 {{ messages[0].content }} b9")
    model, attempts = resolve_model(str(base_gpt2)), [_attempt("please b1 b2")]
    with pytest.raises(ModelError, match="has no chat template"):
        render_attempts(model, attempts, chat_template="model", max_new_tokens=8)
    texts: dict[TemplateSource, str] = {
        "plain": "User: please b1 b2\n\nAssistant:",
        file: "b0 please b1 b2 b9",
    }
    for template, text in texts.items():
        found = render_attempts(model, attempts, chat_template=template, max_new_tokens=8)
        assert found.ids == [tuple(tokenizer(text)["input_ids"])]
        assert found.max_model_len == len(found.ids[0]) + 8


def test_greedy_completions_are_those_of_the_model(tiny_llama: Path, tokenizer: Any) -> None:
    import torch

    ids = [prompt_ids(tokenizer, _attempt(t)) for t in ("please b1", "please b2 b3 b4", "b1")]
    written = _written(tiny_llama, [*ids, ids[0]], GREEDY)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for prompt, one in zip([*ids, ids[0]], written, strict=True):
        assert one.rendered.ids[: one.rendered.num_prompt_tokens] == prompt
        assert len(one.response_ids) == 6 or one.finished
        expected = list(prompt)
        with torch.no_grad():
            for _ in one.response_ids:
                logits = model(torch.tensor([expected])).logits
                expected.append(int(logits[0, -1].argmax()))
        assert one.rendered.ids == tuple(expected)
        assert one.text == tokenizer.decode(one.response_ids, skip_special_tokens=True)
    assert written[0] == written[3]


def test_a_cut_completion_keeps_its_prompt(tiny_llama: Path, tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, _attempt("please b1"))
    (one,) = _written(tiny_llama, [ids], GREEDY)
    cut = one.first_tokens(2)
    assert cut.ids == one.rendered.ids[: len(ids) + 2]
    assert cut.num_prompt_tokens == len(ids)
    assert one.first_tokens(0).ids == ids


def test_sampling_repeats_with_its_seed_and_changes_with_another(
    tiny_llama: Path, tokenizer: Any
) -> None:
    ids = [prompt_ids(tokenizer, _attempt("please b1"))]

    def sample(seed: int) -> tuple[int, ...]:
        sampling = GREEDY._replace(temperature=1.5, seed=seed, max_new_tokens=20)
        (one,) = _written(tiny_llama, ids, sampling)
        return one.response_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_prompt_that_does_not_fit_is_named() -> None:
    attempts = [_attempt("a"), _attempt("b")]
    ids = [(1,) * 10, (1,) * 30]
    assert check_lengths(attempts, ids, max_new_tokens=8, context=38) == 38
    with pytest.raises(ConfigError, match=r"suite 'direct'.*30 tokens and 8 to write.*at most 37"):
        check_lengths(attempts, ids, max_new_tokens=8, context=37)
