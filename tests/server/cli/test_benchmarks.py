"""`bench train`: wrong options; the benchmark itself is tested with the training package."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from circuit_breakers.cli import app

runner = CliRunner()


def test_help_of_bench_train_shows_an_example() -> None:
    result = runner.invoke(app, ["bench", "train", "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_bench_api_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "Example:" in runner.invoke(app, ["bench", "api", "--help"]).output
    for arguments, exit_code, said in (
        (["--json", str(tmp_path / "none" / "out.json")], 2, "--json"),
        (["--at-once", "0"], 2, "at-once"),
        (["--model", "no-such-model"], 1, "error: "),
    ):
        result = runner.invoke(app, ["bench", "api", *arguments])
        assert result.exit_code == exit_code, result.output
        assert said in result.stderr


def test_bench_guards_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "Example:" in runner.invoke(app, ["bench", "guards", "--help"]).output
    paths = ["--artifact", str(tmp_path), "--data", str(tmp_path)]
    new = ["--out", str(tmp_path / "new")]
    for arguments, exit_code, said in (
        ([*paths, "--out", str(tmp_path)], 2, "which exists"),
        ([*paths, *new, "--skip", "nope"], 2, "expected one of minilm"),
        ([*paths, *new, "--limit", "0"], 2, "limit"),
        ([*paths, *new], 1, "error: "),
    ):
        result = runner.invoke(app, ["bench", "guards", *arguments])
        assert result.exit_code == exit_code, result.output
        assert said in result.stderr


def test_wrong_options_exit_with_2(tmp_path: Path) -> None:
    for arguments, said in (
        (["--arm", "nope"], "expected published"),
        (["--json", str(tmp_path / "none" / "out.json")], "--json"),
        (["--rows-per-kind", "0"], "rows-per-kind"),
    ):
        result = runner.invoke(app, ["bench", "train", *arguments])
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_a_benchmark_that_cannot_start_exits_with_1() -> None:
    for arguments in (["--model", "no-such-model"], ["--recipe", "no-such-recipe"]):
        result = runner.invoke(app, ["bench", "train", *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
