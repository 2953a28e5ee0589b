"""What of a report is written, and the report of a saved breaker made again."""

from __future__ import annotations

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from circuit_breakers.artifact import builtin_breaker_path, load_breaker
from circuit_breakers.cli import app
from circuit_breakers.errors import ArtifactError, ConfigError
from circuit_breakers_training.report import log_columns, rebuild_report, report_files

from .html_page import Page
from .report_metrics import full_metrics


def shipped_breaker() -> Path:
    path = builtin_breaker_path("smollm2-135m-instruct")
    assert path is not None
    return path


def test_files_of_an_artifact() -> None:
    metrics = full_metrics()
    files = report_files(metrics)
    assert set(files) == {
        *("metrics.json", "report.md", "report.html"),
        *("plots/loss.png", "plots/cosine.png", "plots/roc.png"),
    }
    assert json.loads(files["metrics.json"]) == metrics
    assert report_files(metrics) == files
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", files["report.md"].decode())
    assert set(named) <= set(files)
    for name in named:
        assert files[name].startswith(b"\x89PNG")


def test_curves_are_thinned_to_their_end() -> None:
    entries = [{"step": i + 1, "loss": 1 / 3, "seconds": 2.0} for i in range(1201)]
    entries[-1]["grad_norm"] = 1.0
    log = log_columns(entries)
    # 1,201 entries into at most 500 points: every third, the last one included.
    assert log["step"][:2] == [1, 4]
    assert log["step"][-1] == 1201
    assert log["loss"][0] == 0.33333
    # Neither a column that is no curve, nor one with holes.
    assert set(log) == {"step", "loss"}
    assert log_columns([]) == {}


def test_a_saved_report_is_made_again_outside(tmp_path: Path) -> None:
    breaker = shipped_breaker()
    out = tmp_path / "again.html"
    written = rebuild_report(breaker, out)
    assert written == (out, tmp_path / "again.md")
    page = Page(out.read_text(encoding="utf-8"))
    assert load_breaker(breaker).digest in page.text_in("td")
    assert f"{load_breaker(breaker).manifest.created:%Y-%m-%dT%H:%M:%SZ}" in page.text_in("td")
    assert "plots/" not in written.markdown.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="exists"):
        rebuild_report(breaker, out)
    rebuild_report(breaker, out, overwrite=True)


def test_a_saved_breaker_is_never_written_into(tmp_path: Path) -> None:
    copy = tmp_path / "breaker"
    shutil.copytree(shipped_breaker(), copy)
    for place in (copy / "report.html", copy / "plots" / "x.html"):
        with pytest.raises(ConfigError, match="lies in the breaker"):
            rebuild_report(copy, place, overwrite=True)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        rebuild_report(copy, tmp_path / "report.pdf")
    with pytest.raises(ConfigError, match="directory that exists"):
        rebuild_report(copy, tmp_path / "none" / "report.html")
    load_breaker(copy)


def _with_metrics(tmp_path: Path, content: bytes) -> Path:
    """A breaker that is sound but for what its metrics say."""
    copy = tmp_path / "breaker"
    shutil.copytree(shipped_breaker(), copy)
    (copy / "metrics.json").write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["files"]["metrics.json"] = sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "got no name, model, probe, test"),
        (b'{"name": "x", "model": {}, "probe": {}, "test": {}}', "make no report"),
        (b'{"name": "x", "model": 1, "probe": [], "test": null}', "make no report"),
    ],
)
def test_metrics_that_make_no_report_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        rebuild_report(_with_metrics(tmp_path, content), tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_a_breaker_without_metrics_is_refused(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "breaker-v1"
    with pytest.raises(ArtifactError, match=r"without metrics\.json"):
        rebuild_report(golden, tmp_path / "out.html")


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(shipped_breaker()), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"ok: {out}\nok: {out.with_suffix('.md')}\n"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "exists" in result.stderr
