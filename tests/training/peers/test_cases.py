"""Who sees what, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.errors import CalibrationError, DataError
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.peers.cases import Cases, gather_cases, look_points

from .conftest import make_case


def _gather(data_dir: Path, tokenizer: Any, **more: Any) -> Cases:
    fields: dict[str, Any] = {
        "max_length": 64,
        "target_fpr": 0.05,
        "confidence": 0.95,
        "limit": None,
    }
    return gather_cases(load_dataset(data_dir), tokenizer, **{**fields, **more})


def test_a_text_is_the_prompt_and_the_first_tokens_of_the_answer(tokenizer: Any) -> None:
    case = make_case(tokenizer, "harmful", "please h1", "h2 h3 h4")
    assert case.harmful
    assert case.num_answer_tokens == 3  # the tiny tokenizer has a token a word
    assert case.text(0) == case.prompt == "please h1"
    assert [case.text(n) for n in (1, 3)] == ["please h1\n\nh2", "please h1\n\nh2 h3 h4"]


def test_looks_come_every_few_tokens_and_at_the_end(tokenizer: Any) -> None:
    case = make_case(tokenizer, "benign", "please b1", "b1 b2 b3 b4 b5")
    assert look_points(case, "prompt", 2) == (0,)
    assert look_points(case, "whole", 2) == (5,)
    assert look_points(case, "growing", 2) == (0, 2, 4, 5)
    assert look_points(case, "growing", 5) == (0, 5)


def test_all_or_some_cases(data_dir: Path, tokenizer: Any) -> None:
    # The dataset of ../evaluation: 60 + 40, 20 + 12, 60 benign ones of 64, 66 + 12.
    cases = _gather(data_dir, tokenizer)
    assert [len(cases.train), len(cases.selection), len(cases.test)] == [100, 32, 78]
    assert len(cases.calibration) == 60
    assert not any(case.harmful for case in cases.calibration)
    few = _gather(data_dir, tokenizer, limit=5)
    assert [case.harmful for case in few.test] == [False] * 5 + [True] * 5
    assert len(few.calibration) == 59  # fewer show nothing about a rate of 5 %


def test_refused_requests_take_no_part(data_dir: Path, tokenizer: Any) -> None:
    dataset = load_dataset(data_dir)
    refusal = replace(dataset.test[0], kind="refusal", label="benign")
    more = replace(
        dataset, test=(*dataset.test, refusal), calibration=(*dataset.calibration, refusal)
    )
    cases = gather_cases(
        more, tokenizer, max_length=64, target_fpr=0.05, confidence=0.95, limit=None
    )
    assert (len(cases.test), len(cases.calibration)) == (78, 60)


@pytest.mark.parametrize("split", ["train", "selection", "test"])
@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_an_empty_group_is_refused(data_dir: Path, tokenizer: Any, split: str, label: str) -> None:
    dataset = load_dataset(data_dir)
    rows = tuple(row for row in getattr(dataset, split) if row.label != label)
    with pytest.raises(DataError, match=f"no {label} conversation among .* the {split} split"):
        gather_cases(
            replace(dataset, **{split: rows}),
            tokenizer,
            max_length=64,
            target_fpr=0.05,
            confidence=0.95,
            limit=None,
        )


def test_too_few_calibration_conversations_are_refused(data_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="expected at least 299"):
        _gather(data_dir, tokenizer, target_fpr=0.01)
