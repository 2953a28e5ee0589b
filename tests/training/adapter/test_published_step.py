"""One training step: its losses and gradients are those of the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_breakers_training.adapter.batch_losses import batch_losses
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.batches import padded_batch
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.recipes.config import ObjectiveRecipe, Tokens
from circuit_breakers_training.render import Rendered, render

from ..tiny_recipes import LLAMA, Conversations
from .published_losses import published_losses
from .target_states import target_states

pytestmark = pytest.mark.usefixtures("one_thread")


def rendered(model_dir: Path, conversations: list[Conversation]) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return [render(tokenizer, c.messages, max_length=64) for c in conversations]


@pytest.mark.parametrize("first_depth", [0.0, 0.25])
def test_losses_and_gradients_equal_the_published_step(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path, first_depth: float
) -> None:
    recipe = LLAMA.model_copy(
        update={
            "layers": (1, 2),
            "objective": ObjectiveRecipe(retain="absolute", retain_weight=1.0),
            "lora": LLAMA.lora.model_copy(update={"first_depth": first_depth}),
        }
    )
    retain = rendered(tiny_llama, conversations["retain"][:3])
    harmful = rendered(tiny_llama, conversations["harmful"][:3])
    streams = Streams(recipe, tiny_llama, torch.device("cpu"))
    with torch.no_grad():
        for parameter in streams.parameters.values():
            # The adapter is stored in bfloat16; both sides get the same numbers.
            parameter.copy_((parameter * 3).bfloat16().float())
    ours = batch_losses(recipe, streams, retain, harmful, step=30)
    ours.loss.backward()

    streams.save_adapter(tmp_path, base_name="tiny-llama")
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()
    reference = PeftModel.from_pretrained(whole, tmp_path, is_trainable=True).eval()
    retain_loss, reroute_loss = published_losses(reference, retain, harmful, [1, 2])
    # alpha 10, t = 30 of T = 60: 10 * 30 / 120 and 10 * (1 - 30 / 120).
    loss = 2.5 * retain_loss + 7.5 * reroute_loss
    loss.backward()

    # Same formula, same weights, float32, other order of sums.
    assert ours.retain_loss.item() == pytest.approx(retain_loss.item(), rel=1e-5)
    assert ours.reroute_loss.item() == pytest.approx(reroute_loss.item(), rel=1e-5)
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == (14 * (2 if first_depth else 3))  # A and B of 7 modules a block
    for name, parameter in streams.parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_reroute_gradient_is_not_zero_at_the_start(
    tiny_llama: Path, conversations: Conversations
) -> None:
    streams = Streams(LLAMA, tiny_llama, torch.device("cpu"))
    retain = rendered(tiny_llama, conversations["retain"][:4])
    harmful = rendered(tiny_llama, conversations["harmful"][:4])
    losses = batch_losses(LLAMA, streams, retain, harmful, step=0)
    losses.loss.backward()
    # At step 0 the retain coefficient is 0: all of the gradient is the reroute loss's.
    norms = {n: p.grad.norm().item() for n, p in streams.parameters.items() if p.grad is not None}
    assert len(norms) == len(streams.parameters)
    assert all(norm > 0 for norm in norms.values())


def test_company_and_padding_of_a_row_change_nothing(
    tiny_llama: Path, conversations: Conversations
) -> None:
    streams = Streams(LLAMA, tiny_llama, torch.device("cpu"))
    rows = sorted(rendered(tiny_llama, conversations["retain"]), key=lambda r: len(r.ids))
    short, long = rows[0], rows[-1]
    [(alone_CD, _)] = target_states(streams, streams.batch([short], ["all"]))
    both = [short, long]
    kinds: list[Tokens] = ["all", "all"]
    for batch in (streams.batch(both, kinds), padded_batch(both, kinds, streams.device)):
        [(together_CD, _)] = target_states(streams, batch)
        torch.testing.assert_close(together_CD[: len(short.ids)], alone_CD, rtol=1e-5, atol=1e-5)
