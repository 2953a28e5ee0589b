"""Soft prompts against the tiny breaker, from one step to whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from circuit_breakers.artifact import load_breaker
from circuit_breakers.errors import ConfigError, DataError, EvaluationError, ModelError
from circuit_breakers.guard.policy import Policy
from circuit_breakers_training.attack.settings import (
    TARGETS,
    SearchSettings,
    SoftPromptSettings,
)
from circuit_breakers_training.attack.setup import attacked_rows, set_scene
from circuit_breakers_training.attack.soft_prompt import (
    Case,
    SoftPrompt,
    render_case,
    run_soft_prompt,
)
from circuit_breakers_training.attack.white_box import WhiteBox
from circuit_breakers_training.data.dataset import Dataset, load_dataset
from circuit_breakers_training.data.jsonl import Conversation, Message

from ..evaluation.conftest import NUM_TEST

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case(roomy_llama: Path, data_dir: Path) -> Case:
    (row,) = attacked_rows(load_dataset(data_dir), limit=1)
    return render_case(AutoTokenizer.from_pretrained(roomy_llama), row, answer_tokens=5)


def test_a_case_is_cut_right_before_the_request(case: Case, roomy_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roomy_llama)
    assert case.before_ids + case.after_ids == case.prompt_ids
    assert tokenizer.decode(case.before_ids) == "<|user|>"
    assert tokenizer.decode(case.after_ids) == f"{case.request} <|end|> <|assistant|>"
    assert len(case.answer_ids) <= 5
    assert all(token.startswith("h") for token in tokenizer.decode(case.answer_ids).split())


def test_of_several_turns_the_last_request_is_cut(roomy_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roomy_llama)
    turns = (Message("user", "b1"), Message("assistant", "b1"), Message("user", " b1 "))
    row = Conversation(
        messages=(*turns, Message("assistant", "b2 b3")), label="harmful", source="s", group="g"
    )
    case = render_case(tokenizer, row, answer_tokens=9)
    assert tokenizer.decode(case.after_ids) == "b1 <|end|> <|assistant|>"
    assert tokenizer.decode(case.before_ids) == (
        "<|user|> b1 <|end|> <|assistant|> b1 <|end|> <|user|>"
    )


def test_a_template_that_alters_the_request_is_refused(roomy_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roomy_llama)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content", "m.content | upper if m.role == 'user' else m.content"
    )
    row = Conversation(
        messages=(Message("user", "b1 b2"), Message("assistant", "b3")),
        label="harmful",
        source="s",
        group="g",
    )
    with pytest.raises(ModelError, match="alters the user's text, expected"):
        render_case(tokenizer, row, answer_tokens=1)


def test_both_losses_fall_and_looks_come_when_they_should(
    settings: SoftPromptSettings, breaker_dir: Path, roomy_llama: Path, case: Case
) -> None:
    breaker = load_breaker(breaker_dir)
    (probe,) = breaker.manifest.probes
    # A threshold that everything is above.
    low = probe.model_copy(update={"threshold_logit": -20.0})
    policy = Policy(breaker="b", probes=(low,), mode="enforce")
    settings = replace(settings, steps=40, check_every=15)
    looks: list[tuple[int, Tensor]] = []

    def look(step: int, prompt_TD: Tensor) -> bool:
        looks.append((step, prompt_TD))
        return False

    attack = SoftPrompt(WhiteBox(roomy_llama, breaker), policy, settings)
    losses = attack.attack(case, look, seed=1)
    first, last = losses["answer_loss_first"], losses["answer_loss_last"]
    assert first is not None and last is not None and last < 0.9 * first
    assert losses["penalty_last"] < losses["penalty_first"]  # type: ignore[operator]
    # The milestones 0, 1 and 10, every fifteenth step, and the last.
    assert [step for step, _ in looks] == [0, 1, 10, 15, 30, 40]
    lengths = [len(prompt_TD) for _, prompt_TD in looks]
    assert lengths == [len(case.prompt_ids)] + [len(case.prompt_ids) + settings.tokens] * 5
    assert not any(prompt_TD.requires_grad for _, prompt_TD in looks)


def test_nothing_is_moved_once_it_is_enough(
    settings: SoftPromptSettings, breaker_dir: Path, roomy_llama: Path, case: Case
) -> None:
    attack = SoftPrompt(WhiteBox(roomy_llama, load_breaker(breaker_dir)), None, settings)
    assert set(attack.attack(case, lambda *_: True, seed=1).values()) == {None}
    steps: list[int] = []

    def after_one(step: int, _: Tensor) -> bool:
        steps.append(step)
        return step == 1

    losses = attack.attack(case, after_one, seed=1)
    assert steps == [0, 1]
    assert losses["answer_loss_first"] == losses["answer_loss_last"]


def test_a_loss_that_is_not_finite_is_no_defence(
    settings: SoftPromptSettings, breaker_dir: Path, roomy_llama: Path, case: Case
) -> None:
    steep = replace(settings, learning_rate=float("inf"))
    attack = SoftPrompt(WhiteBox(roomy_llama, load_breaker(breaker_dir)), None, steep)
    with pytest.raises(EvaluationError, match="at step 1, expected finite ones; lower --lr"):
        attack.attack(case, lambda *_: False, seed=1)


def test_a_start_is_that_of_its_seed(
    settings: SoftPromptSettings, breaker_dir: Path, roomy_llama: Path
) -> None:
    attack = SoftPrompt(WhiteBox(roomy_llama, load_breaker(breaker_dir)), None, settings)
    assert torch.equal(attack.start(3), attack.start(3))
    assert not torch.equal(attack.start(3), attack.start(4))


def test_a_whole_run_reports_every_target_without_a_word(
    settings: SoftPromptSettings, tmp_path: Path, data_dir: Path
) -> None:
    results = run_soft_prompt(settings)
    assert json.loads((settings.out / "results.json").read_text()) == results
    assert tuple(results["targets"]) == TARGETS
    assert results["breaker"]["digest"] == load_breaker(settings.artifact).digest
    assert "fitted on the model with the adapter" in results["note"]
    for name, found in results["targets"].items():
        assert list(found["broken_within"]) == ["0", "1", "3"]
        assert all(share["num"] == 2 for share in found["broken_within"].values())
        assert len(found["rows"]) == 2
        for row in found["rows"]:
            spent = row["broken_at"] if row["broken_at"] is not None else settings.steps
            assert row["spent"] == spent
            judged = name in ("probe", "both")
            assert (row["score_first"] is None) is not judged
            assert (row["answer_loss_first"] is None) == (row["broken_at"] == 0)
            # Without a probe nothing trips.
            assert row["broken_at"] is not None or not row["wanted_last"] or judged
    report = (settings.out / "report.md").read_text()
    assert report.count("| adapter and probe |") == 1
    # Every word of the tiny language that a harmful text has begins so.
    words = [f"h{i}" for i in range(30)]
    stored = report.split() + json.dumps(results).replace('"', " ").split()
    assert not set(words) & set(stored)
    assert {p.name for p in settings.out.iterdir()} == {"results.json", "report.md"}

    again = run_soft_prompt(replace(settings, out=tmp_path / "again", save_texts=True))
    assert again["targets"] == results["targets"]
    lines = (tmp_path / "again" / "completions.jsonl").read_text().splitlines()
    saved = [json.loads(line) for line in lines]
    assert {(one["attack"], one["request"]) for one in saved} == {
        (name, index) for name in TARGETS for index in range(2)
    }
    for one in saved:
        assert one["at"] == again["targets"][one["attack"]]["rows"][one["request"]]["spent"]


def test_a_base_model_is_attacked_on_the_template_that_its_breaker_brings(
    settings: SoftPromptSettings, plain_breaker_dir: Path, base_gpt2: Path
) -> None:
    plain = replace(
        settings,
        artifact=plain_breaker_dir,
        model=str(base_gpt2),
        limit=1,
        steps=1,
    )
    assert tuple(run_soft_prompt(plain)["targets"]) == TARGETS


def test_coherent_is_told_by_benign_answers_at_the_temperature_of_the_attack(
    settings: SoftPromptSettings,
) -> None:
    """Sampled answers surprise a model more than greedy ones, and would all be degenerate."""
    limits = []
    for temperature in (0.0, 1.0):
        search = SearchSettings(
            artifact=settings.artifact,
            data=settings.data,
            out=settings.out,
            model=settings.model,
            max_new_tokens=settings.max_new_tokens,
            backend="transformers",
            degenerate_share=settings.degenerate_share,
            url="http://127.0.0.1:1",
            temperature=temperature,
        )
        limits.append(set_scene(search).referee(search, None).limits.max_nats_per_token)
    greedy, sampled = limits
    assert sampled > greedy + 0.1


def test_requests_are_taken_once_evenly_and_in_their_first_words(data_dir: Path) -> None:
    dataset = load_dataset(data_dir)
    every = attacked_rows(dataset, limit=1000)
    assert len(every) == NUM_TEST["harmful"]
    assert attacked_rows(dataset, limit=3) == every[::4]
    assert attacked_rows(_only(dataset, dataset.test * 2), limit=1000) == every
    # As `data build` names requests in other words.
    reworded = tuple(
        replace(row, source="harmful_reworded", messages=(Message("user", "h0"), row.messages[1]))
        for row in every
    )
    assert attacked_rows(_only(dataset, (*reworded, *dataset.test)), limit=1000) == every


def test_what_cannot_be_attacked_is_refused(
    settings: SoftPromptSettings, data_dir: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(data_dir)
    benign = tuple(row for row in dataset.test if row.label == "benign")
    with pytest.raises(DataError, match="no harmful request among 66 conversations"):
        attacked_rows(_only(dataset, benign), limit=1)
    with pytest.raises(ConfigError, match="expected at most 2048 together"):
        run_soft_prompt(replace(settings, tokens=2040))
    settings.out.mkdir()
    with pytest.raises(ConfigError, match="exists"):
        run_soft_prompt(settings)


def _only(dataset: Dataset, rows: Any) -> Dataset:
    return replace(dataset, test=rows)
