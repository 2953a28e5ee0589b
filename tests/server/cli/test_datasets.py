"""`data import` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app

runner = CliRunner()


@pytest.fixture
def harmful(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"Do thing{i} number{i}",
            "output": f"PLACEHOLDER {i}",
            "llama3_output": "I can't help with that.",
        }
        for i in range(60)
    ]
    path = tmp_path / "cb.json"
    path.write_text(json.dumps(rows))
    return path


def test_sources_are_imported_and_counted(harmful: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["data", "import", "--from", str(harmful), "--from", str(harmful)]
    arguments += ["--format", "auto", "--format", "circuit-breakers-refusals"]
    arguments += ["--repeat", "1", "--repeat", "3", "--limit", "0", "--out", str(out)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"ok: {out} imported in ")
    assert lines[1] == (
        "cb.json (circuit-breakers): 60 rows read, 60 kept, dropped none, 1 x in train"
    )
    assert lines[2].startswith("cb.json (circuit-breakers-refusals): 60 rows read")
    summary = json.loads((out / "dataset.json").read_text())
    train = summary["counts"]["train"]
    assert train["benign"] == 3 * train["harmful"]
    again = runner.invoke(app, arguments)
    assert again.stdout.splitlines()[0] == f"ok: {out} found"


def test_a_missing_label_is_noted(harmful: Path, tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["data", "import", "--from", str(harmful), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "note: no benign conversation to train on" in result.stdout


def test_a_broken_source_exits_with_1_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,reply\na,b\n")
    result = runner.invoke(
        app, ["data", "import", "--from", str(path), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith(f'error: {path}:2: got the columns "question", "reply", which')
    assert not (tmp_path / "out").exists()


def test_a_plain_template_needs_a_model_that_renders_by_it(harmful: Path, tmp_path: Path) -> None:
    arguments = ["--from", str(harmful), "--out", str(tmp_path / "out"), "--plain-template"]
    result = runner.invoke(app, ["data", "import", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: got the plain chat template without a model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "auto", "--format", "auto"], "got --format 2 times for 3 sources"),
        (["--repeat", "1", "--repeat", "2"], "got --repeat 2 times for 3 sources"),
        (["--limit", "1", "--limit", "2"], "got --limit 2 times for 3 sources"),
        (["--repeat", "0"], "--repeat"),
        (["--nope"], "--nope"),
    ],
)
def test_wrong_usage_exits_with_2(
    harmful: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    sources = ["--from", str(harmful)] * 3
    result = runner.invoke(
        app, ["data", "import", *sources, "--out", str(tmp_path / "out"), *arguments]
    )
    assert result.exit_code == 2
    assert said in result.stderr
