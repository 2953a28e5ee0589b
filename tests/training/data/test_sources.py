import hashlib
import json
from pathlib import Path

import pytest

from circuit_breakers.errors import DataError
from circuit_breakers_training.data.plan import Planned
from circuit_breakers_training.data.sources import (
    SourceRows,
    SourceSpec,
    locate,
    read_evaluation_rows,
    read_source,
)

HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    "A placeholder behaviour,standard,illegal,,,one\n"
    "Another placeholder,contextual,illegal,context,A context.,two\n"
)


def _numbered(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"Request {i}", "output": "PLACEHOLDER" if i % 3 else "", "llama3_output": "No."}
        for i in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def _read(
    path: Path, *, seed: int = 0, limit: int | None = None, name: str | None = None
) -> SourceRows:
    return read_source(locate(SourceSpec(location=str(path), limit=limit, format=name)), seed=seed)


def test_rows_are_read_in_order_and_the_others_counted(tmp_path: Path) -> None:
    read = _read(_numbered(tmp_path / "cb.json", 7))
    assert read.format == "circuit-breakers"
    assert [row.prompt for row in read.rows] == [f"Request {i}" for i in (1, 2, 4, 5)]
    assert (read.num_read, read.dropped) == (7, {"empty answer": 3})


def test_a_named_format_is_used_instead_of_the_detected_one(tmp_path: Path) -> None:
    read = _read(_numbered(tmp_path / "cb.json", 3), name="circuit-breakers-refusals")
    assert {row.label for row in read.rows} == {"benign"}


def test_a_limit_draws_rows_by_the_seed(tmp_path: Path) -> None:
    path = _numbered(tmp_path / "cb.json", 60)
    draws = [_read(path, limit=10, seed=seed) for seed in (0, 0, 1)]
    prompts = [[row.prompt for row in read.rows] for read in draws]
    assert prompts[0] == prompts[1] != prompts[2]
    assert prompts[0] == sorted(prompts[0], key=lambda prompt: int(prompt.split()[1]))
    # 20 of 60 have no answer; 10 of the other 40 are taken.
    assert draws[0].dropped == {"empty answer": 20, "over the limit": 30}
    assert len(_read(path, limit=100).rows) == 40


def test_a_source_is_known_by_its_digest_and_not_by_its_place(tmp_path: Path) -> None:
    path = _numbered(tmp_path / "cb.json", 3)
    described = locate(SourceSpec(location=str(path))).describe()
    assert described["from"] == "cb.json"
    assert described["files"] == {"cb.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert str(tmp_path) not in json.dumps(described)


@pytest.mark.parametrize("name", [None, "harmbench"])
def test_an_evaluation_set_is_refused_as_training_data(tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "behaviors.csv"
    path.write_text(HARMBENCH)
    with pytest.raises(DataError, match="got harmbench, which is for evaluation only"):
        _read(path, name=name)


def test_prompts_of_an_evaluation_set_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "behaviors.csv"
    path.write_text(HARMBENCH)
    found = read_evaluation_rows(locate(SourceSpec(location=str(path))))
    assert [row.prompt for row in found.rows] == [
        "A placeholder behaviour",
        "A context.\n\n---\n\nAnother placeholder",
    ]


def test_prompts_without_answers_are_planned(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("id,prompt,type,label,focus,note\n1,How to end a program?,homonyms,safe,,\n")
    (row,) = _read(path).rows
    assert isinstance(row, Planned)


def test_a_later_row_without_the_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cb.jsonl"
    row = json.dumps({"prompt": "a", "output": "b", "llama3_output": "c"})
    path.write_text(f'{row}\n{{"prompt": "a"}}\n')
    with pytest.raises(DataError, match=r'cb\.jsonl:2: got the columns "prompt", expected prompt'):
        _read(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SourceSpec(location="none.csv"), r'got the source "none\.csv", expected a file'),
        (SourceSpec(location=".", format="csv"), 'got the format "csv", expected one of'),
        (SourceSpec(location=".", repeat=0), "got repeat 0 and limit None, expected at least 1"),
        (SourceSpec(location=".", limit=0), "got repeat 1 and limit 0, expected at least 1"),
        (SourceSpec(location="."), r'got the source "\.", expected a file'),
        (SourceSpec(location="hf:nothing"), r"expected hf:OWNER/NAME\[@REVISION\]\[:FILE\]"),
    ],
)
def test_what_cannot_be_located_is_named(spec: SourceSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        locate(spec)
