from __future__ import annotations

from pathlib import Path

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.evaluation.results import check_out, environment, write_results


def test_results_appear_whole_and_are_replaced_only_on_demand(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results"
    check_out(out, overwrite=False)
    write_results(out, {"results.json": b"{}", "plots/a.png": b"png"})
    assert (out / "plots" / "a.png").read_bytes() == b"png"
    with pytest.raises(ConfigError, match="--overwrite"):
        check_out(out, overwrite=False)
    check_out(out, overwrite=True)
    write_results(out, {"results.json": b"{}"})
    assert sorted(p.name for p in out.iterdir()) == ["results.json"]
    assert [p.name for p in out.parent.iterdir()] == ["results"]


def test_what_is_not_results_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds no results\.json"):
        check_out(tmp_path, overwrite=True)


def test_environment_names_versions() -> None:
    found = environment("transformers")
    assert found["backend"] == "transformers"
    assert {"torch", "transformers"} <= set(found["versions"])
