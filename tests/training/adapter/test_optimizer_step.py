from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.optimizer_step import learning_rate, split_step, take_step
from circuit_breakers_training.adapter.parallel_streams import ParallelStreams
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter
from circuit_breakers_training.data.jsonl import Conversation
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import LoraRecipe, Recipe
from circuit_breakers_training.render import Rendered, render
from circuit_breakers_training.run_log import read_metrics

Conversations = dict[str, list[Conversation]]

FIVE_STEPS = Recipe(
    model="tiny",
    steps=5,
    batch_size=4,
    max_length=64,
    learning_rate=1e-3,
    precision="fp32",
    lora=LoraRecipe(rank=4, b_init_std=0.02),
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_schedule_counts_optimiser_steps_whatever_the_parts(
    tiny_llama: Path, conversations: Conversations, tmp_path: Path, micro_batch_size: int | None
) -> None:
    recipe = FIVE_STEPS.model_copy(update={"micro_batch_size": micro_batch_size})
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    result = train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=tmp_path)
    first, _, middle, _, last = read_metrics(result.metrics_path)
    # alpha 10 and T = 5: 10 * t / 10 and 10 * (1 - t / 10) at t = 0, 2, 4.
    assert [e["retain_coefficient"] for e in (first, middle, last)] == pytest.approx([0, 2, 4])
    assert [e["reroute_coefficient"] for e in (first, middle, last)] == pytest.approx([10, 8, 6])
    # 1e-3 * (1 + cos(pi * t / 5)) / 2 at t = 0, 2, 4.
    assert [e["learning_rate"] for e in (first, middle, last)] == pytest.approx(
        [1e-3, 6.545085e-4, 9.54915e-5], rel=1e-6
    )


def test_constant_rate_stays() -> None:
    recipe = FIVE_STEPS.model_copy(update={"schedule": "constant"})
    assert [learning_rate(recipe, step) for step in range(5)] == [1e-3] * 5


# --- parts of a step ---------------------------------------------------------------------------


class Several(Processes):
    """One of several processes, as far as sharing out goes."""

    def __init__(self, index: int, count: int) -> None:
        self.index = index
        self.count = count


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_every_row_is_in_one_part_and_all_processes_have_as_many(
    batch_size: int, count: int, micro_batch_size: int | None
) -> None:
    recipe = FIVE_STEPS.model_copy(update={"micro_batch_size": micro_batch_size})
    retain = [Rendered(ids=(i, 0), num_prompt_tokens=1) for i in range(batch_size)]
    harmful = [Rendered(ids=(100 + i, 0), num_prompt_tokens=1) for i in range(batch_size)]
    split = [split_step(recipe, Several(i, count), retain, harmful) for i in range(count)]
    assert len({len(parts) for parts in split}) == 1
    counted = [part for parts in split for part in parts if part.counts]
    assert sorted(r.ids for p in counted for r in p.retain) == sorted(r.ids for r in retain)
    assert sorted(r.ids for p in counted for r in p.harmful) == sorted(r.ids for r in harmful)
    for parts in split:
        for part in parts:
            # A wrapped model needs rows of both kinds even where none is left.
            assert len(part.retain) == len(part.harmful) >= 1
            assert len(part.retain) <= (micro_batch_size or batch_size)


def test_losses_and_gradients_are_those_of_the_whole_batch(
    tiny_llama: Path, conversations: Conversations
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    retain, harmful = (
        [render(tokenizer, c.messages, max_length=64) for c in conversations[kind][:5]]
        for kind in ("retain", "harmful")
    )
    # Rows differ in length, so that a mean of means would be another number.
    assert len({len(row.ids) for row in retain}) > 1
    entries, states = [], []
    for micro_batch_size in (None, 1, 2):
        recipe = FIVE_STEPS.model_copy(update={"micro_batch_size": micro_batch_size})
        model = ParallelStreams(recipe, tiny_llama, Processes(recipe))
        entries.append(take_step(recipe, model, retain, harmful, step=3))
        states.append(model.whole_state())
    for entry, state in zip(entries[1:], states[1:], strict=True):
        for name in ("loss", "retain_loss", "reroute_loss", "retain_cosine", "reroute_cosine"):
            assert entry[name] == pytest.approx(entries[0][name], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(entries[0]["grad_norm"], rel=1e-4)
        for name, tensor in states[0].items():
            # After one step, exp_avg is a tenth of the clipped gradient.
            if name.startswith("optimizer/exp_avg/"):
                gap = (state[name] - tensor).abs().max() / tensor.abs().max()
                assert gap < 1e-3


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_leaves_the_adapter_as_it_was(
    tiny_llama: Path, conversations: Conversations, factor: float
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    retain, harmful = (
        [render(tokenizer, c.messages, max_length=64) for c in conversations[kind][:4]]
        for kind in ("retain", "harmful")
    )
    model = ParallelStreams(FIVE_STEPS, tiny_llama, Processes(FIVE_STEPS))
    before = {name: tensor.clone() for name, tensor in model.whole_parameters().items()}
    # As of a backward pass that overflows where the loss did not.
    next(iter(model.streams.parameters.values())).register_hook(lambda gradient: gradient * factor)
    with pytest.raises(ConfigError, match=r"norm of the gradient is (inf|nan) at step 5, expected"):
        take_step(FIVE_STEPS, model, retain, harmful, step=4)
    after = model.whole_parameters()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- every architecture by every path ----------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_three_steps_train_every_adapter_weight(
    request: pytest.FixtureRequest,
    conversations: Conversations,
    tmp_path: Path,
    family: str,
    precision: str,
    gradient_checkpointing: bool,
    micro_batch_size: int | None,
) -> None:
    model_dir: Path = request.getfixturevalue(f"tiny_{family}")
    recipe = FIVE_STEPS.model_copy(
        update={
            "steps": 3,
            "batch_size": 3,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
            "micro_batch_size": micro_batch_size,
            "lora": LoraRecipe(rank=4, b_init_std=0.02, dropout=0.05, first_depth=0.25),
        }
    )
    model = ParallelStreams(recipe, model_dir, Processes(recipe))
    before = model.whole_parameters()
    before = {name: tensor.clone() for name, tensor in before.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    retain, harmful = (
        [render(tokenizer, c.messages, max_length=64) for c in conversations[kind][:9]]
        for kind in ("retain", "harmful")
    )
    model.streams.set_dropout(True)
    for step in range(3):
        rows = slice(3 * step, 3 * step + 3)
        entry = take_step(recipe, model, retain[rows], harmful[rows], step)
        assert 0 < entry["grad_norm"] < float("inf")
    # A reroute cosine of random models may be anything, but is one.
    assert -1 <= entry["reroute_cosine"] <= 1
    after = model.whole_parameters()
    assert all((after[name] != tensor).any() for name, tensor in before.items())
