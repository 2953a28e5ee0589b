"""Losses and gradients against the published step, and parts of a step against the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuit_breakers_training.adapter.batch_losses import (
    BatchLosses,
    TokenCounts,
    batch_losses,
    count_tokens,
)
from circuit_breakers_training.adapter.streams import Streams
from circuit_breakers_training.recipes.config import LoraRecipe, ObjectiveRecipe, Recipe
from circuit_breakers_training.render import Rendered

from ..architectures import PACKED, PADDED, random_rows, write_model
from .published_losses import published_losses

CPU = torch.device("cpu")
RECIPE = Recipe(
    model="tiny",
    steps=60,
    layers=(1, 2),
    precision="fp32",
    objective=ObjectiveRecipe(retain="absolute", retain_weight=1.0),
    lora=LoraRecipe(rank=8, b_init_std=0.06),
)
RETAIN = random_rows(5, seed=1)
HARMFUL = random_rows(4, seed=2, longest=30)
STEP = 30

pytestmark = pytest.mark.usefixtures("one_thread")


def made_streams(recipe: Recipe, directory: Path) -> Streams:
    streams = Streams(recipe, directory, CPU)
    with torch.no_grad():
        for parameter in streams.parameters.values():
            # The adapter is stored in bfloat16; both sides get the same numbers.
            parameter.copy_(parameter.bfloat16().float())
    return streams


def gradients(streams: Streams, loss: Tensor) -> dict[str, Tensor]:
    for parameter in streams.parameters.values():
        parameter.grad = None
    loss.backward()
    found = {n: p.grad for n, p in streams.parameters.items() if p.grad is not None}
    assert found.keys() == streams.parameters.keys()
    return found


def worst_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative L2 difference of one tensor."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


def assert_published(recipe: Recipe, directory: Path, tmp_path: Path, *, packed: bool) -> None:
    streams = made_streams(recipe, directory)
    assert streams.packed == packed
    ours = batch_losses(recipe, streams, RETAIN, HARMFUL, STEP)
    found = gradients(streams, ours.loss)

    streams.save_adapter(tmp_path / "adapter", base_name="tiny")
    whole = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    published = PeftModel.from_pretrained(whole, tmp_path / "adapter", is_trainable=True).eval()
    retain_loss, reroute_loss = published_losses(published, RETAIN, HARMFUL, [1, 2])
    # alpha 10, t = 30 of T = 60: 10 * 30 / 120 and 10 * (1 - 30 / 120).
    loss = 2.5 * retain_loss + 7.5 * reroute_loss
    loss.backward()
    expected = {n: p.grad for n, p in published.named_parameters() if p.grad is not None}

    # Same formula, same weights, float32, other order of sums.
    assert ours.retain_loss.item() == pytest.approx(retain_loss.item(), rel=1e-6)
    assert ours.reroute_loss.item() == pytest.approx(reroute_loss.item(), rel=1e-6)
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert worst_difference(found, expected) < 2e-5


@pytest.mark.parametrize("first_depth", [0.0, 0.25])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_losses_and_gradients_equal_the_published_step(
    architecture: str, first_depth: float, tmp_path: Path
) -> None:
    lora = RECIPE.lora.model_copy(update={"first_depth": first_depth})
    recipe = RECIPE.model_copy(update={"lora": lora})
    directory = write_model(architecture, tmp_path / "model")
    assert_published(recipe, directory, tmp_path, packed=True)


@pytest.mark.parametrize("architecture", PADDED)
def test_padded_losses_and_gradients_equal_the_published_step(
    architecture: str, tmp_path: Path
) -> None:
    assert_published(RECIPE, write_model(architecture, tmp_path / "model"), tmp_path, packed=False)


def test_blocks_run_again_in_backward_give_the_same_gradients(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"gradient_checkpointing": True})
    directory = write_model("llama", tmp_path / "model")
    assert_published(recipe, directory, tmp_path, packed=True)


def test_retaining_all_layers_counts_the_shared_ones(tmp_path: Path) -> None:
    objective = RECIPE.objective.model_copy(update={"retain_layers": "all"})
    lora = RECIPE.lora.model_copy(update={"first_depth": 0.25})
    recipe = RECIPE.model_copy(update={"objective": objective, "lora": lora})
    streams = made_streams(recipe, write_model("llama", tmp_path))
    errors: dict[int, float] = {}

    def measure(layer: int, adapted_CD: Tensor, base_CD: Tensor) -> None:
        errors[layer] = (adapted_CD - base_CD).norm(dim=-1).mean().item()

    streams.compare(streams.batch(RETAIN, ["all"] * len(RETAIN)), measure)
    assert list(errors) == [0, 1, 2]
    assert errors[0] == 0  # block 0 has no adapter
    losses = batch_losses(recipe, streams, RETAIN, HARMFUL, STEP)
    assert losses.retain_loss.item() == pytest.approx(sum(errors.values()) / 3, rel=1e-5)


def target_states(streams: Streams, rows: list[Rendered]) -> list[Tensor]:
    """(C, D) adapted states at each target."""
    states: list[Tensor] = []
    batch = streams.batch(rows, ["all"] * len(rows))
    streams.compare(batch, lambda _, adapted_CD, __: states.append(adapted_CD))
    return states


def test_company_of_a_row_changes_nothing(tmp_path: Path) -> None:
    streams = made_streams(RECIPE, write_model("mistral", tmp_path))
    rows = random_rows(12, seed=3)
    together = target_states(streams, rows)
    start = 0
    for row in rows:
        end = start + len(row.ids)
        for ours, alone in zip(together, target_states(streams, [row]), strict=True):
            torch.testing.assert_close(ours[start:end], alone, rtol=1e-4, atol=1e-5)
        start = end


def added(parts: list[BatchLosses]) -> BatchLosses:
    return BatchLosses(*(sum(values) for values in zip(*parts, strict=True)))  # type: ignore[arg-type]


def test_parts_of_a_step_add_up_to_the_whole(tmp_path: Path) -> None:
    streams = made_streams(RECIPE, write_model("llama", tmp_path))
    whole = batch_losses(RECIPE, streams, RETAIN, HARMFUL, STEP)
    expected = gradients(streams, whole.loss)
    totals = count_tokens(RECIPE, RETAIN, HARMFUL)
    # Unequal parts, one without benign and one without harmful rows, one with neither.
    parts = [
        (RETAIN[:1], HARMFUL[:2]),
        (RETAIN[1:3], []),
        ([], HARMFUL[2:]),
        ([], []),
        (RETAIN[3:], []),
    ]
    found: dict[str, Tensor] = {}
    losses = []
    for retain, harmful in parts:
        part = batch_losses(RECIPE, streams, retain, harmful, STEP, totals=totals)
        for name, gradient in gradients(streams, part.loss).items():
            found[name] = found.get(name, torch.zeros(())) + gradient
        losses.append(part)
    # The same sums of float32 in another order.
    for ours, theirs in zip(added(losses)[:5], whole[:5], strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert worst_difference(found, expected) < 2e-5


def test_counts_are_those_of_the_recipe() -> None:
    objective = ObjectiveRecipe(retain_tokens="all", reroute_tokens="response")
    recipe = RECIPE.model_copy(update={"objective": objective})
    rows = [Rendered(ids=(5, 6, 7, 8), num_prompt_tokens=3)]
    assert count_tokens(recipe, rows * 2, rows) == TokenCounts(retain=8, reroute=1)


def test_a_kind_without_rows_costs_nothing(tmp_path: Path) -> None:
    streams = made_streams(RECIPE, write_model("llama", tmp_path))
    benign = batch_losses(RECIPE, streams, RETAIN, [], STEP)
    assert benign.reroute_loss.item() == benign.reroute_cosine.item() == 0
    assert benign.retain_loss.item() > 0
    harmful = batch_losses(RECIPE, streams, [], HARMFUL, STEP)
    assert harmful.retain_loss.item() == harmful.retain_cosine.item() == 0
    assert harmful.reroute_loss.item() > 0


def test_bfloat16_losses_are_float32_and_close(tmp_path: Path) -> None:
    directory = write_model("llama", tmp_path)
    exact = batch_losses(RECIPE, made_streams(RECIPE, directory), RETAIN, HARMFUL, STEP)
    recipe = RECIPE.model_copy(update={"precision": "bf16"})
    rounded = batch_losses(recipe, made_streams(recipe, directory), RETAIN, HARMFUL, STEP)
    assert rounded.loss.dtype == torch.float32
    # bfloat16 keeps 8 bits; errors of many tokens average out.
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
