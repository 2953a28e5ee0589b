"""Losses and greedy text against one conversation at a time in plain transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.fluency import LanguageModel, Loss, perplexities
from circuit_breakers_training.render import Rendered, render_all


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_losses_equal_those_of_single_rows(
    model: str, request: pytest.FixtureRequest, conversations: dict[str, list[Conversation]]
) -> None:
    model_dir: Path = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = render_all(tokenizer, conversations["heldout_retain"], max_length=64).rows
    losses = LanguageModel(model_dir).losses(rows)
    plain = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for row, loss in zip(rows, losses, strict=True):
        with torch.no_grad():
            logit_TV = plain(torch.tensor([row.ids])).logits[0]
        start = row.num_prompt_tokens
        log_prob = logit_TV[start - 1 : -1].log_softmax(-1)
        chosen = log_prob[range(len(row.ids) - start), row.ids[start:]]
        assert loss.num_tokens == len(row.ids) - start
        assert loss.nats == pytest.approx(-chosen.sum().item(), rel=1e-4)


def test_rows_without_a_response_or_a_prompt_lose_nothing(tiny_llama: Path) -> None:
    model = LanguageModel(tiny_llama)
    nothing = Rendered(ids=(2, 5, 6), num_prompt_tokens=3)
    assert model.losses([nothing, nothing]) == [Loss(0.0, 0)] * 2
    # The very first token has nothing that it could be predicted from.
    (loss,) = model.losses([Rendered(ids=(2, 5, 6), num_prompt_tokens=0)])
    assert loss.num_tokens == 2
    (known,) = model.losses([Rendered(ids=(2, 5, 6), num_prompt_tokens=1)])
    assert loss.nats == pytest.approx(known.nats)


def test_continuations_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    model = LanguageModel(tiny_llama)
    prompts = [[2, 5, 6, 7, 4, 3], [2, 5, 30, 4, 3], [2, 8, 9, 10, 11, 12, 4, 3]]
    together = model.continuations(prompts, max_new_tokens=8)
    assert together == [model.continuations([p], max_new_tokens=8)[0] for p in prompts]


def test_perplexity_is_per_token_within_a_stratum() -> None:
    losses = [Loss(3.0, 1), Loss(1.0, 3), Loss(0.0, 5)]
    assert perplexities(losses, ["a", "a", "b"]) == {"a": math.exp(4 / 4), "b": 1.0}
