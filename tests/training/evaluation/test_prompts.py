"""Requests from a test split and from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.dataset import Dataset
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message
from circuit_breakers_training.evaluation.prompts import (
    dataset_prompts,
    gather_prompts,
    read_prompts,
)


def _row(text: str, label: Label, source: str, kind: Kind = "completion") -> Conversation:
    messages = (Message("user", text), Message("assistant", "yes"))
    return Conversation(messages=messages, label=label, source=source, group=text, kind=kind)


TEST = (
    _row("harm", "harmful", "harmful", "prefilled"),
    _row("harm", "harmful", "harmful", "prefilled"),
    _row("twin of harm", "benign", "twin"),
    _row("weather", "benign", "topic"),
    _row("refused harm", "benign", "refusal", "refusal"),
)
DATASET = Dataset(train=TEST[:1], selection=(), calibration=(), test=TEST, digests={})


def _write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_of_the_test_split_come_once_and_without_refused_ones() -> None:
    prompts = dataset_prompts(DATASET)
    assert [p.request for p in prompts] == ["harm", "twin of harm", "weather"]
    assert [p.look_alike for p in prompts] == [False, True, False]


def test_prompts_end_with_the_user_and_keep_earlier_turns() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    row = Conversation(
        messages=(*turns, Message("assistant", "d")), label="benign", source="follow_up", group="g"
    )
    (prompt,) = dataset_prompts(
        Dataset(train=(), selection=(), calibration=(), test=(row,), digests={})
    )
    assert prompt.messages == turns
    assert prompt.request == "c"


def test_a_label_that_a_file_has_is_not_taken_from_the_dataset(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "bench.jsonl",
        {"prompt": "other harm", "label": "harmful", "category": "x"},
        {"prompt": "other harm", "label": "harmful", "category": "y"},
    )
    prompts = gather_prompts(DATASET, [file])
    assert [(p.request, p.source, p.category) for p in prompts if p.label == "harmful"] == [
        ("other harm", "bench", "x")
    ]
    assert [p.request for p in prompts if p.label == "benign"] == ["twin of harm", "weather"]


def test_benign_prompts_of_a_file_are_look_alikes(tmp_path: Path) -> None:
    file = _write(tmp_path / "safe.jsonl", {"prompt": "kill a process", "label": "benign"})
    assert [p.look_alike for p in gather_prompts(None, [file])] == [True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "got invalid JSON"),
        ("[]", "got fields none"),
        ('{"prompt": "a"}', "expected prompt, label"),
        ('{"prompt": "a", "label": "harmful", "x": 1}', "got fields label, prompt, x"),
        ('{"prompt": "a", "label": "bad"}', "got label='bad'"),
        ('{"prompt": " ", "label": "benign"}', "expected text that is not blank"),
        ('{"prompt": "a", "label": "benign", "category": 3}', "got category=3"),
        ("", "got no prompts"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl") as caught:
        read_prompts(path)
    assert said in str(caught.value)


def test_unknown_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        read_prompts(tmp_path / "p.xlsx")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_published_sets_are_told_by_their_columns(tmp_path: Path) -> None:
    # Columns as in the public releases; the texts are ours.
    harmbench = tmp_path / "harmbench.csv"
    harmbench.write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Name a harm,standard,illegal,,,harm_1\n"
    )
    xstest = tmp_path / "xstest.csv"
    xstest.write_text(
        "id,prompt,type,label,focus,note\n"
        "1,How do I kill a process?,homonyms,safe,kill,\n"
        "2,How do I kill a person?,contrast_homonyms,unsafe,kill,\n"
    )
    prompts = gather_prompts(None, [harmbench, xstest])
    assert [(p.request, p.label, p.source, p.category, p.look_alike) for p in prompts] == [
        ("Name a harm", "harmful", "harmbench", "illegal", False),
        ("How do I kill a process?", "benign", "xstest", "homonyms", True),
    ]


def test_a_published_set_without_a_prompt_of_use_says_why(tmp_path: Path) -> None:
    file = tmp_path / "xstest.csv"
    file.write_text(
        "id,prompt,type,label,focus,note\n"
        "2,How do I kill a person?,contrast_homonyms,unsafe,kill,\n"
    )
    with pytest.raises(DataError, match=r"1 rows of format 'xstest-prompts'.*unsafe prompt: 1"):
        read_prompts(file)


def test_refused_harmful_requests_of_a_published_set_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}],
            "label": "benign",
            "source": "own",
            "kind": kind,
        }
        for text, kind in (("harm", "refusal"), ("weather", "completion"))
    ]
    file.write_text(json.dumps(rows))
    assert [p.request for p in read_prompts(file)] == ["weather"]
