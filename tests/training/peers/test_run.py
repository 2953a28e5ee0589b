"""A whole comparison with the tiny breaker, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app
from circuit_breakers.errors import ConfigError, DataError
from circuit_breakers_training.data.dataset import load_dataset
from circuit_breakers_training.evaluation.settings import check_skips
from circuit_breakers_training.peers.run import bench_guards
from circuit_breakers_training.peers.settings import GUARDS, GuardsSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_guard_has_a_row_on_the_same_conversations(
    breaker_dir: Path,
    roomy_llama: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("circuit_breakers_training.peers.text_guards.find_spec", lambda name: None)
    out = tmp_path / "guards"
    options = ["--artifact", breaker_dir, "--data", data_dir, "--out", out, "--model", roomy_llama]
    # The tiny tokenizer has no yes and no, which a judge needs.
    done = CliRunner().invoke(app, ["bench", "guards", *map(str, options), "--skip", "judge"])
    assert done.exit_code == 0, done.output
    text = (out / "guards.json").read_text()
    report = json.loads(text)
    assert report["same_data"] is True
    assert report["num_cases"]["calibration"] == 60
    rows = {(row["name"], row["sees"]): row for row in report["guards"]}
    # Three of TF-IDF, three packages that are missing, the judge, the base model, three of ours.
    assert len(rows) == len(report["guards"]) == 11
    not_run = {name: row["not_run"] for (name, _), row in rows.items() if row["not_run"]}
    assert len(not_run) == 4
    assert sum("pip install 'circuit-breakers[peers]'" in why for why in not_run.values()) == 3
    assert not_run["base model as judge"] == "named by --skip"
    ran = [row for row in rows.values() if not row["not_run"]]
    for row in ran:
        assert (row["num_harmful"], row["num_benign"]) == (12, 66)
        assert row["tpr"]["num"] == 12 and row["benign"]["num"] == 66
    scored = [row for row in ran if row["auroc"] is not None]
    assert [row["name"] for row in scored][3:] == ["ours: probe only", "ours: adapter and probe"]
    for row in scored:
        # Words of the two labels are different ones: whoever learns anything tells them apart.
        assert row["auroc"] > 0.9, row["name"]
        assert row["leak"]["of"] == scored[0]["leak"]["of"] > 12
    prompt, whole, growing = scored[:3]
    assert whole["leak"]["num_tokens"] == whole["leak"]["of"]
    assert growing["leak"]["num_tokens"] <= growing["leak"]["of"]
    trips = prompt["tpr"]["count"]
    assert prompt["leak"]["num_tokens"] == 0 if trips == 12 else prompt["leak"]["num_tokens"] > 0
    page = (out / "guards.html").read_text()
    assert 'id="guards-roc' in page and "ours: adapter and probe" in page
    assert "ours: adapter and probe" in done.output
    for row in load_dataset(data_dir).test:
        assert row.prompt not in text + page
    assert str(tmp_path) not in text + page


def test_a_base_model_writes_on_the_template_that_its_breaker_brings(
    plain_breaker_dir: Path, base_gpt2: Path, data_dir: Path, tmp_path: Path
) -> None:
    report = bench_guards(
        GuardsSettings(
            artifact=plain_breaker_dir,
            data=data_dir,
            out=tmp_path / "guards",
            model=str(base_gpt2),
            limit=2,
            skip=tuple(name for name in GUARDS if name != "adapter"),
        )
    )
    base, adapter = (row for row in report.rows if not row.not_run)
    assert base.num_benign == adapter.num_benign > 0


def test_prompts_that_the_breaker_was_made_from_are_refused(
    breaker_dir: Path, roomy_llama: Path, data_dir: Path, tmp_path: Path
) -> None:
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    summary = json.loads((data_dir / "dataset.json").read_text())
    files = {
        "train": "test",
        "test": "train",
        "selection": "selection",
        "calibration": "calibration",
    }
    for name, source in files.items():
        (swapped / f"{name}.jsonl").write_bytes((data_dir / f"{source}.jsonl").read_bytes())
    summary["sha256"] = {f"{n}.jsonl": summary["sha256"][f"{s}.jsonl"] for n, s in files.items()}
    (swapped / "dataset.json").write_text(json.dumps(summary))
    settings = GuardsSettings(
        artifact=breaker_dir, data=swapped, out=tmp_path / "out", model=str(roomy_llama)
    )
    with pytest.raises(DataError, match="prompts that the breaker's train split holds"):
        bench_guards(settings)
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    paths = {"artifact": tmp_path, "data": tmp_path}
    with pytest.raises(ConfigError, match="which exists"):
        GuardsSettings(**paths, out=tmp_path)
    with pytest.raises(ConfigError, match="limit 0"):
        GuardsSettings(**paths, out=tmp_path / "new", limit=0)
    assert check_skips(["judge", "judge"], GUARDS) == ("judge",)
    with pytest.raises(ConfigError, match="'judges', expected one of " + ", ".join(GUARDS)):
        check_skips(["judges"], GUARDS)
