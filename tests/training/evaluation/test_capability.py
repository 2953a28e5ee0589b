"""Perplexity on the tiny model, and the harness by a package that is laid out as lm_eval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError, EvaluationError
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.evaluation.capability import (
    benign_answers,
    benign_perplexity,
    check_lm_eval,
    compare_losses,
    run_lm_eval,
)
from circuit_breakers_training.fluency import Loss


def test_answers_are_benign_and_limited_by_source(data_dir: Path) -> None:
    answers = benign_answers(load_dataset(data_dir), limit=5)
    assert {(c.label, c.source) for c in answers} == {("benign", "topic"), ("benign", "twin")}
    assert len(answers) == 10


def test_no_answers_are_an_empty_suite() -> None:
    with pytest.raises(DataError, match="suite 'capability' is empty"):
        benign_answers(None, limit=5)


def test_a_model_has_no_change_against_itself(tiny_llama: Path, data_dir: Path) -> None:
    answers = benign_answers(load_dataset(data_dir), limit=5)
    models = {"base": tiny_llama, "adapter": tiny_llama}
    found = benign_perplexity(models, answers, chat_template="model", max_length=64, console=None)
    assert found["num_conversations"] == {"topic": 5, "twin": 5, "all": 10}
    for stratum in ("topic", "twin", "all"):
        measured = found["perplexity"][stratum]
        # A random model over 80 words is about as surprised as by chance.
        assert 40 < measured["base"] < 400
        assert measured["adapter_change"] == measured["adapter_change_of_rest"] == 0
        assert measured["adapter_doubled"] == 0
    logs = {s: math.log(found["perplexity"][s]["base"]) for s in found["perplexity"]}
    assert min(logs["topic"], logs["twin"]) < logs["all"] < max(logs["topic"], logs["twin"])


def test_one_broken_answer_is_told_from_a_change_of_all() -> None:
    base = [Loss(20.0, 10), Loss(10.0, 10), Loss(30.0, 10)]
    one_broken = [Loss(20.1, 10), Loss(40.0, 10), Loss(30.1, 10)]
    found = compare_losses({"base": base, "adapter": one_broken})
    assert found["base"] == pytest.approx(math.exp(2))
    assert found["adapter_change"] == pytest.approx(math.exp(30.2 / 30) - 1)
    assert found["adapter_doubled"] == 1
    assert found["adapter_change_of_rest"] == pytest.approx(math.exp(0.2 / 20) - 1)

    all_a_little = [Loss(of.nats + 6, 10) for of in base]
    found = compare_losses({"base": base, "adapter": all_a_little})
    assert found["adapter_doubled"] == 0
    assert found["adapter_change_of_rest"] == found["adapter_change"] == pytest.approx(0.822, 1e-3)

    found = compare_losses({"base": base[1:2], "adapter": one_broken[1:2]})
    assert (found["adapter_doubled"], found["adapter_change_of_rest"]) == (1, None)


def test_answers_that_do_not_fit_are_a_failure(tiny_llama: Path, data_dir: Path) -> None:
    answers = benign_answers(load_dataset(data_dir), limit=5)
    with pytest.raises(EvaluationError, match="got no answer that begins within 4 tokens"):
        benign_perplexity(
            {"base": tiny_llama}, answers, chat_template="model", max_length=4, console=None
        )


HARNESS = """
import json
def simple_evaluate(*, model, model_args, tasks, limit, log_samples, **seeds):
    assert model == "hf" and model_args["trust_remote_code"] is False and not log_samples
    if "broken" in tasks:
        raise KeyError("broken")
    found = {t: {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": t, "n": limit} for t in tasks}
    found.pop("lost", None)
    return {"results": found, "versions": seeds}
"""


@pytest.fixture
def harness(install_harness: Callable[[str], None]) -> None:
    """What lm_eval 0.4.13 takes and gives, without its tasks."""
    install_harness(HARNESS)


@pytest.mark.usefixtures("harness")
def test_numbers_of_the_harness_come_by_task_and_model() -> None:
    check_lm_eval(["arc_easy"])
    models = {"base": Path("base"), "adapter": Path("merged")}
    found = run_lm_eval(models, ["arc_easy"], limit=7, seed=0)
    numbers = {"acc,none": 0.5, "n": 7}
    assert found == {"arc_easy": {"base": numbers, "adapter": numbers}}
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("task", "said"), [("broken", "the harness failed on model 'base'"), ("lost", "no result")]
)
def test_a_task_that_fails_or_is_lost_is_an_error(task: str, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        run_lm_eval({"base": Path("base")}, ["arc_easy", task], limit=7, seed=0)
