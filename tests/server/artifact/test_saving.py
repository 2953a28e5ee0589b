"""A breaker is saved whole or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuit_breakers.artifact import Breaker, ProbeWeights, load_breaker, save_breaker
from circuit_breakers.errors import ArtifactError


def siblings(out: Path) -> set[str]:
    """What lies beside `out`, temporary directories included."""
    return {p.name for p in out.parent.iterdir()}


class TestSave:
    def test_loads_back_equal(self, saved: Breaker) -> None:
        loaded = load_breaker(saved.path)
        assert loaded.manifest == saved.manifest
        assert loaded.digest == saved.digest
        assert loaded.weights["layer1"].weight_D.dtype == np.float32

    def test_digest_is_of_the_manifest_bytes(self, saved: Breaker) -> None:
        data = (saved.path / "manifest.json").read_bytes()
        assert saved.digest == hashlib.sha256(data).hexdigest()

    def test_same_parts_give_the_same_digest(
        self, parts: dict[str, Any], tmp_path: Path, saved: Breaker
    ) -> None:
        assert save_breaker(tmp_path / "again", **parts).digest == saved.digest

    def test_leaves_no_trace_of_the_machine(self, saved: Breaker) -> None:
        text = (saved.adapter_dir / "adapter_config.json").read_text()
        assert "org/tiny" in text
        assert "/somewhere" not in text
        assert not (saved.adapter_dir / "README.md").exists()

    def test_files_follow_the_umask(self, saved: Breaker) -> None:
        umask = os.umask(0)
        os.umask(umask)
        modes = {p.stat().st_mode & 0o777 for p in saved.path.rglob("*") if p.is_file()}
        assert modes == {0o666 & ~umask}

    def test_leaves_no_temporary_directory(self, saved: Breaker) -> None:
        assert siblings(saved.path) == {"breaker", "adapter-in"}

    def test_refuses_to_overwrite(self, parts: dict[str, Any], saved: Breaker) -> None:
        with pytest.raises(ArtifactError, match="exists, expected a new directory"):
            save_breaker(saved.path, **parts)
        assert load_breaker(saved.path).digest == saved.digest

    def test_overwrites_a_breaker_when_asked(self, parts: dict[str, Any], saved: Breaker) -> None:
        parts["name"] = "second"
        second = save_breaker(saved.path, **parts, overwrite=True)
        assert load_breaker(saved.path).manifest.name == "second"
        assert second.path == saved.path
        assert siblings(saved.path) == {"breaker", "adapter-in"}

    def test_never_overwrites_what_is_no_breaker(
        self, parts: dict[str, Any], tmp_path: Path
    ) -> None:
        precious = tmp_path / "home"
        precious.mkdir()
        (precious / "thesis.tex").write_text("years of work")
        with pytest.raises(ArtifactError, match="is no breaker"):
            save_breaker(precious, **parts, overwrite=True)
        assert (precious / "thesis.tex").read_text() == "years of work"

    def test_failed_overwrite_keeps_the_old_one(
        self, parts: dict[str, Any], saved: Breaker
    ) -> None:
        parts["probes"] = parts["probes"][:1]
        with pytest.raises(ArtifactError, match="got weights for"):
            save_breaker(saved.path, **parts, overwrite=True)
        assert load_breaker(saved.path).digest == saved.digest

    @pytest.mark.parametrize("call", range(1, 12))
    def test_kill_at_any_flush_leaves_nothing_visible(
        self, call: int, saved: Breaker, tmp_path: Path
    ) -> None:
        """SIGKILL at the n-th fsync: six files, then the directories, then after the rename."""
        code = f"""
import os, pathlib, runpy, signal
from circuit_breakers.artifact import save_breaker
maker = runpy.run_path({str(Path(__file__).parents[2] / "golden/make_breaker_v1.py")!r})
parts = maker["breaker_parts"](pathlib.Path({str(tmp_path / "adapter-in")!r}))
real, calls = os.fsync, 0
def fsync(descriptor):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
save_breaker(pathlib.Path({str(tmp_path / "killed")!r}), **parts)
"""
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        out = tmp_path / "killed"
        if out.exists():  # killed after the rename, or not at all: then it must be whole
            assert load_breaker(out).digest == saved.digest
            assert call > 9
        else:
            assert done.returncode == -signal.SIGKILL
        assert all(
            name.startswith(".killed.")
            for name in siblings(out) - {"killed", "breaker", "adapter-in"}
        )

    @pytest.mark.parametrize(
        "name",
        [
            "model.bin",
            "data.pkl",
            "setup.py",
            "weights.safetensors",
            "../report.md",
            "/etc/report.md",
            "a/../report.md",
            "adapter/notes.md",
            "manifest.json",
            ".hidden.md",
            "",
        ],
    )
    def test_refuses_extra_file(self, name: str, parts: dict[str, Any], tmp_path: Path) -> None:
        parts["extra_files"] = {name: b"x"}
        with pytest.raises(ArtifactError, match="got extra file"):
            save_breaker(tmp_path / "new", **parts)
        assert not (tmp_path / "new").exists()

    def test_copies_extra_files_from_paths(self, parts: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "m.json").write_text("{}")
        parts["extra_files"] = {"metrics.json": tmp_path / "m.json"}
        breaker = save_breaker(tmp_path / "new", **parts)
        assert (breaker.path / "metrics.json").read_text() == "{}"
        assert "metrics.json" in breaker.manifest.files

    @pytest.mark.parametrize(
        ("weight_D", "bias", "message"),
        [
            (np.full(8, np.nan, np.float32), 0.0, "NaN or infinite"),
            (np.full(8, np.inf, np.float32), 0.0, "NaN or infinite"),
            (np.ones(8, np.float32), float("nan"), "NaN or infinite"),
            (np.ones(8, np.float32), 1e39, "NaN or infinite"),
            (np.ones(7, np.float32), 0.0, r"got float32 \(7,\), expected float32 \(8,\)"),
            (np.ones((8, 1), np.float32), 0.0, r"got float32 \(8, 1\)"),
            (np.ones(8), 0.0, "got float64"),
        ],
    )
    def test_refuses_bad_probe_weights(
        self, weight_D: Any, bias: float, message: str, parts: dict[str, Any], tmp_path: Path
    ) -> None:
        parts["weights"]["layer2"] = ProbeWeights(weight_D, bias)
        with pytest.raises(ArtifactError, match=message):
            save_breaker(tmp_path / "new", **parts)
        assert not (tmp_path / "new").exists()

    def test_refuses_a_recipe_that_json_cannot_hold(
        self, parts: dict[str, Any], tmp_path: Path
    ) -> None:
        parts["recipe"] = {"lr": float("nan")}
        with pytest.raises(ArtifactError, match="expected finite numbers"):
            save_breaker(tmp_path / "new", **parts)

    def test_names_the_field_of_a_bad_part(self, parts: dict[str, Any], tmp_path: Path) -> None:
        parts["name"] = "No Spaces Allowed"
        with pytest.raises(ArtifactError, match="field 'name': got 'No Spaces Allowed', expected"):
            save_breaker(tmp_path / "new", **parts)

    def test_names_a_missing_adapter_file(self, parts: dict[str, Any], tmp_path: Path) -> None:
        (parts["adapter_dir"] / "adapter_model.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"cannot read .*adapter_model\.safetensors"):
            save_breaker(tmp_path / "new", **parts)
