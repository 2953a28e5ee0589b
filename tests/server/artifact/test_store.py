from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breakers.artifact import (
    Breaker,
    ProbeWeights,
    builtin_breaker_path,
    load_breaker,
    save_breaker,
)
from circuit_breakers.errors import ArtifactError, BreakerMismatchError

Forge = Callable[[str, bytes], Path]

# Printed by tests/golden/make_breaker_v1.py when the directory was made.
GOLDEN_DIGEST = "075e6401875af8c152a8675fd4e798f5985ed7e9e483ecc0897b99f3672002cd"


def siblings(out: Path) -> set[str]:
    """What lies beside `out`, temporary directories included."""
    return {p.name for p in out.parent.iterdir()}


class TestGolden:
    """Breakers that users already have must load in every later version, with the same values."""

    def test_loads_with_the_digest_it_was_made_with(self, golden_path: Path) -> None:
        assert load_breaker(golden_path).digest == GOLDEN_DIGEST

    def test_holds_the_values_it_was_made_with(self, golden_path: Path) -> None:
        breaker = load_breaker(golden_path)
        manifest = breaker.manifest
        assert (manifest.name, manifest.schema_version) == ("golden", 1)
        assert manifest.base_model.id == "org/tiny"
        assert manifest.created.isoformat() == "2026-11-24T12:00:00+00:00"
        assert manifest.recipe == {"steps": 3, "alpha": 10.0, "target_layers": [1, 2]}
        assert [(p.name, p.layer, p.threshold_logit) for p in manifest.probes] == [
            ("layer1", 1, 2.5),
            ("layer2", 2, -1.0),
        ]
        assert manifest.probes[1].aggregation.alpha == 0.25
        assert manifest.probes[0].calibration.fpr_upper_bound == 0.00994
        assert manifest.canaries[1].messages[0].content == "What is 2 + 2? ✓"
        assert list(breaker.weights) == ["layer1", "layer2"]
        assert breaker.weights["layer1"].weight_D.tolist() == [i / 4 for i in range(8)]
        assert breaker.weights["layer1"].bias == -0.5
        assert breaker.weights["layer2"].weight_D.tolist() == [-1.0] * 8
        assert breaker.weights["layer2"].bias == 0.25

    def test_names_its_adapter_directory(self, golden_path: Path) -> None:
        assert sorted(p.name for p in load_breaker(golden_path).adapter_dir.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]


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


class TestLoad:
    @pytest.mark.parametrize(
        "name",
        [
            "probes.safetensors",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "report.md",
            "plots/loss.png",
        ],
    )
    def test_names_the_file_with_another_digest(self, name: str, saved: Breaker) -> None:
        with (saved.path / name).open("ab") as file:
            file.write(b"\0")
        with pytest.raises(ArtifactError, match=f"{name}: got sha256 [0-9a-f]+, expected"):
            load_breaker(saved.path)

    @settings(
        max_examples=300,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_detects_any_flipped_bits(
        self, data: st.DataObject, golden_path: Path, tmp_path: Path
    ) -> None:
        """Outside the manifest a digest catches it; inside, the breaker's own digest changes."""
        names = sorted(p for p in golden_path.rglob("*") if p.is_file())
        path = data.draw(st.sampled_from(names))
        original = path.read_bytes()
        offset = data.draw(st.integers(0, len(original) - 1))
        mask = data.draw(st.integers(1, 255))
        damaged = tmp_path / "damaged"
        shutil.copytree(golden_path, damaged)
        try:
            flipped = bytearray(original)
            flipped[offset] ^= mask
            (damaged / path.relative_to(golden_path)).write_bytes(flipped)
            if path.name == "manifest.json":
                with contextlib.suppress(ArtifactError):
                    assert load_breaker(damaged).digest != GOLDEN_DIGEST
            else:
                with pytest.raises(ArtifactError, match="got sha256"):
                    load_breaker(damaged)
        finally:
            shutil.rmtree(damaged)

    @pytest.mark.parametrize("name", ["probes.safetensors", "report.md", "manifest.json"])
    def test_refuses_a_missing_file(self, name: str, saved: Breaker) -> None:
        (saved.path / name).unlink()
        with pytest.raises(ArtifactError, match=f"no {name}"):
            load_breaker(saved.path)

    @pytest.mark.parametrize(
        "name", ["notes.md", "adapter/adapter_model.bin", "x.pkl", ".hidden", "sub/deep/a.txt"]
    )
    def test_refuses_an_unlisted_file(self, name: str, saved: Breaker) -> None:
        (saved.path / name).parent.mkdir(parents=True, exist_ok=True)
        (saved.path / name).write_bytes(pickle.dumps({}))
        with pytest.raises(ArtifactError, match=f"unlisted {name}"):
            load_breaker(saved.path)

    @pytest.mark.parametrize("name", ["adapter/adapter_model.bin", "data.pkl", "run.py", "m.pt"])
    def test_refuses_pickle_and_code_even_when_listed(self, name: str, forge: Forge) -> None:
        with pytest.raises(ArtifactError, match=f"got extra file '{name}'"):
            load_breaker(forge(name, pickle.dumps({})))

    @pytest.mark.parametrize("name", ["report.md", "plots"])
    def test_refuses_symlinks(self, name: str, saved: Breaker, tmp_path: Path) -> None:
        (saved.path / name).rename(tmp_path / "moved")
        (saved.path / name).symlink_to(tmp_path / "moved")
        with pytest.raises(ArtifactError, match="got a symlink"):
            load_breaker(saved.path)

    def test_refuses_special_files(self, saved: Breaker) -> None:
        os.mkfifo(saved.path / "pipe.md")
        with pytest.raises(ArtifactError, match="got a special file"):
            load_breaker(saved.path)

    def test_loads_through_a_symlink_to_the_whole(self, saved: Breaker, tmp_path: Path) -> None:
        (tmp_path / "current").symlink_to(saved.path)
        assert load_breaker(tmp_path / "current").digest == saved.digest

    def test_refuses_what_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for path in (tmp_path / "absent", tmp_path / "file"):
            with pytest.raises(ArtifactError, match="expected a breaker directory"):
                load_breaker(path)

    def test_error_survives_pickling(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError) as info:
            load_breaker(tmp_path / "absent")
        assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


class TestCheckFits:
    def test_passes_for_the_model_it_was_made_for(self, saved: Breaker) -> None:
        saved.check_fits(saved.manifest.base_model)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("id", "org/other"),
            ("revision", "def456"),
            ("revision", None),
            ("config_sha256", "f" * 64),
            ("num_layers", 5),
            ("hidden_size", 16),
        ],
    )
    def test_refuses_another(self, field: str, value: object, saved: Breaker) -> None:
        other = saved.manifest.base_model.model_copy(update={field: value})
        with pytest.raises(BreakerMismatchError, match=f"with {field}=.* got .*; "):
            saved.check_fits(other)


class TestBuiltinBreakerPath:
    @pytest.mark.parametrize("name", ["no-such-model", "../engine", "a/b", "", "."])
    def test_is_none_where_there_is_no_breaker(self, name: str) -> None:
        assert builtin_breaker_path(name) is None
