from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app
from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.data.dataset import load_dataset, write_dataset
from circuit_breakers_training.evaluation.probe_curve import (
    ProbeCurveSettings,
    print_probe_curve,
    probe_curve,
)

from .conftest import NUM_TEST

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(
    breaker_dir: Path,
    roomy_llama: Path,
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ProbeCurveSettings:
    return ProbeCurveSettings(
        artifact=breaker_dir,
        data=data_dir,
        model=str(roomy_llama),
        out=tmp_path_factory.mktemp("curve") / "results",
        shares=(1.0, 0.25),
        tokens=(0, 4, 99),
    )


@pytest.fixture(scope="module")
def results(settings: ProbeCurveSettings) -> dict[str, Any]:
    return probe_curve(settings)


def test_there_is_a_row_for_each_share_layer_and_cut(
    results: dict[str, Any], settings: ProbeCurveSettings
) -> None:
    assert json.loads((settings.out / "curve.json").read_text()) == results
    assert [row["kind"] for row in results["rows"]] == ["data"] * 2 + ["layers"] + ["tokens"] * 3
    few, whole, layers, *cuts = results["rows"]
    train = load_dataset(settings.data).train
    assert whole["num_harmful"] == sum(row.label == "harmful" for row in train)
    assert 0 < few["num_harmful"] < whole["num_harmful"]
    assert 0 < few["num_benign"] < whole["num_benign"]
    assert [cut["tokens"] for cut in cuts] == [0, 4, 99]
    assert (results["num_harmful"], results["num_benign"]) == (
        NUM_TEST["harmful"],
        NUM_TEST["benign"],
    )
    for row in results["rows"]:
        assert row["tpr_at_1pct_fpr"]["num"] == NUM_TEST["harmful"]
    judged = ("auroc", "low_fpr_auroc", "tpr_at_1pct_fpr")
    assert [whole[name] for name in judged] == [layers[name] for name in judged]
    assert [cuts[-1][name] for name in judged] == [layers[name] for name in judged]
    assert cuts[0]["auroc"] != layers["auroc"], "the answer says something"


def test_the_probe_of_everything_is_the_one_that_the_breaker_has(
    results: dict[str, Any], breaker_dir: Path
) -> None:
    metrics = json.loads((breaker_dir / "metrics.json").read_text())
    of_breaker = metrics["test"]["conversation"]
    whole = results["rows"][2]
    assert whole["auroc"] == pytest.approx(of_breaker["auroc"], abs=1e-3)
    assert whole["tpr_at_1pct_fpr"]["share"] == pytest.approx(
        of_breaker["tpr_at_1pct_fpr"], abs=1e-3
    )


def test_nothing_is_left_beside_the_results(
    results: dict[str, Any], settings: ProbeCurveSettings
) -> None:
    assert [path.name for path in settings.out.parent.iterdir()] == ["results"]
    assert [path.name for path in settings.out.iterdir()] == ["curve.json"]


def test_the_table_has_every_row(
    results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_probe_curve(results)
    printed = capsys.readouterr().out
    for title in ("25.0% of the data", "one layer", "prompt alone", "up to token 4 of the answer"):
        assert title in printed


def test_a_taken_directory_is_refused(
    results: dict[str, Any], settings: ProbeCurveSettings
) -> None:
    with pytest.raises(ConfigError, match="expected a new directory"):
        probe_curve(settings)


def test_another_dataset_is_refused(settings: ProbeCurveSettings, tmp_path: Path) -> None:
    """Its training split may be what the breaker is judged on."""
    other = tmp_path / "other"
    own = load_dataset(settings.data)
    splits = {
        name: list(getattr(own, name)) for name in ("train", "selection", "calibration", "test")
    }
    splits["train"] = splits["train"][1:]
    write_dataset(other, splits, json.loads((settings.data / "dataset.json").read_text()))
    with pytest.raises(DataError, match="was not made with"):
        probe_curve(replace(settings, data=other, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "told"), [("--share=0", "above 0"), ("--share=1.5", "up to 1"), ("--tokens=-1", "0")]
)
def test_what_is_out_of_range_is_refused(option: str, told: str, tmp_path: Path) -> None:
    words = ["--artifact", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, ["probe-curve", *words, option])
    assert done.exit_code == 2
    assert told in done.output


def test_the_command_writes_and_prints(settings: ProbeCurveSettings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [f"--artifact={settings.artifact}", f"--data={settings.data}", f"--out={out}"]
    words += [f"--model={settings.model}", "--share=1", "--tokens=2"]
    done = CliRunner().invoke(app, ["probe-curve", *words])
    assert done.exit_code == 0, done.output
    assert f"ok: {out / 'curve.json'}" in done.output
    shutil.rmtree(out)
