"""`attack`: help, wrong options and what cannot be started; the attacks have tests of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app

runner = CliRunner()
URL = ("--url", "http://127.0.0.1:9")


@pytest.mark.parametrize("command", ["soft-prompt", "search"])
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(app, ["attack", command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_wrong_options_exit_with_2(tmp_path: Path) -> None:
    places = ["--artifact", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for arguments, said in (
        (["soft-prompt", *places, "--lr", "0"], "learning rate of 0.0"),
        (["soft-prompt", *places, "--steps", "0"], "--steps"),
        (["soft-prompt", *places, "--backend", "magic"], "backend 'magic'"),
        (["search", *places], "--url"),
        (["search", *places, "--url", "nowhere"], "expected an http or https URL"),
        (["search", *places, *URL, "--method", "magic"], "methods magic"),
        (["search", *places, *URL, "--population", "1"], "--population"),
    ):
        result = runner.invoke(app, ["attack", *arguments])
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_attack_that_cannot_start_exits_with_1(tmp_path: Path) -> None:
    places = ["--artifact", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for arguments in (["soft-prompt", *places], ["search", *places, *URL]):
        result = runner.invoke(app, ["attack", *arguments])
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
