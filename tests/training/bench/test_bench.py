"""Every arm trains the same adapter on the same rows, and the report says so; no time is judged."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from circuit_breakers.errors import ConfigError, NotReadyError
from circuit_breakers_training.bench import (
    ARMS,
    BenchSettings,
    bench_training,
    print_report,
    report_json,
)
from circuit_breakers_training.bench.arms import OURS, PUBLISHED, chosen_arms, make_loop
from circuit_breakers_training.bench.loops import LossValues
from circuit_breakers_training.bench.peak import peak_memory
from circuit_breakers_training.bench.rows import bench_rows, row_facts
from circuit_breakers_training.data.jsonl import Message
from circuit_breakers_training.data.prompt_lists import twin_pairs
from circuit_breakers_training.recipes.config import LoraRecipe, Recipe
from circuit_breakers_training.render import load_tokenizer, render_prompt

CPU = torch.device("cpu")
RECIPE = Recipe(
    model="tiny",
    steps=10,
    max_length=96,
    precision="fp32",
    lora=LoraRecipe(rank=4, b_init_std=0.05, first_depth=0.25),
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("objective", [{"retain": "absolute", "retain_layers": "all"}, {}])
@pytest.mark.parametrize("arm", [name for name in ARMS if name != "compile"])
def test_every_arm_has_the_losses_of_ours(
    tiny_llama: Path, arm: str, objective: dict[str, str]
) -> None:
    recipe = RECIPE.model_copy(update={"objective": RECIPE.objective.model_copy(update=objective)})
    (rows,) = bench_rows(recipe, tiny_llama, rows_per_kind=3, num_steps=1)
    found: list[LossValues] = []
    gradients = []
    for name in (OURS, arm):
        loop = make_loop(name, recipe, tiny_llama, CPU)
        found.append(loop.backward(rows, 5))
        gradients.append({n: p.grad for n, p in loop.parameters.items()})
    if "dropout" in arm:  # another mask drops other inputs
        assert found[0] != found[1]
        return
    # Sums of float32 in another order.
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_report_has_every_pair(tiny_llama: Path) -> None:
    settings = BenchSettings(
        rows_per_kind=2, num_pairs=3, arms=(PUBLISHED, "padding"), memory=False
    )
    report = bench_training(RECIPE, tiny_llama, settings)
    assert [len(times.wall_ratios) for times in report.times] == [3, 3]
    assert [exact.arm for exact in report.exactness] == [PUBLISHED, OURS]
    assert all(exact.loss_difference < 1e-5 for exact in report.exactness)
    assert all(exact.worst_tensor_difference < 1e-3 for exact in report.exactness)
    raw = json.loads(report_json(report))
    assert len(raw["times"][0]["pairs"]) == 3
    text = StringIO()
    print_report(report, Console(file=text))
    for shown in ("published", ARMS["padding"].label, "2 + 2 rows a step", "quartiles"):
        assert shown in text.getvalue()


def test_all_arms_are_those_that_fit_anywhere() -> None:
    assert set(ARMS) - set(chosen_arms(["all"])) == {"published-unchecked"}
    assert chosen_arms(["padding", PUBLISHED, "padding"]) == ("padding", PUBLISHED)
    with pytest.raises(ConfigError, match="got arm 'nope', expected published"):
        chosen_arms(["all", "nope"])


def test_rows_repeat_and_have_facts(tiny_llama: Path) -> None:
    steps = bench_rows(RECIPE, tiny_llama, rows_per_kind=4, num_steps=3)
    assert steps == bench_rows(RECIPE, tiny_llama, rows_per_kind=4, num_steps=3)
    assert steps != bench_rows(RECIPE, tiny_llama, rows_per_kind=4, num_steps=3, seed=1)
    rows = [row for step in steps for row in (*step.retain, *step.harmful)]
    assert all(0 < row.num_prompt_tokens < len(row.ids) <= 96 for row in rows)
    facts = row_facts(steps)
    assert facts.rows_per_kind == 4
    assert facts.tokens_per_step == pytest.approx(sum(len(row.ids) for row in rows) / 3)
    assert 0 < facts.density <= 1


def test_rows_of_a_base_model_are_on_the_plain_template(base_gpt2: Path) -> None:
    recipe = RECIPE.model_copy(update={"chat_template": "plain"})
    (rows,) = bench_rows(recipe, base_gpt2, rows_per_kind=2, num_steps=1)
    tokenizer = load_tokenizer(base_gpt2, "plain")
    # As many as the words of a prompt have, with "User:" and "Assistant:".
    lengths = {
        len(render_prompt(tokenizer, [Message("user", text)]))
        for pair in twin_pairs()
        for text in (pair.benign, pair.harmful)
    }
    assert {row.num_prompt_tokens for row in (*rows.retain, *rows.harmful)} <= lengths


def test_peak_memory_is_that_of_a_fresh_process(tiny_llama: Path) -> None:
    held = torch.ones(1 << 28)  # 1 GiB, which a child has not
    peak = peak_memory(OURS, RECIPE, tiny_llama, 2)
    assert 0 < peak.loaded_bytes <= peak.peak_bytes < held.numel() * 4


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="exit code 1"):
        peak_memory(OURS, RECIPE, tmp_path, 2)
