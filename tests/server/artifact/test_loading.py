"""A breaker is loaded whole and unchanged, or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breakers.artifact import Breaker, builtin_breaker_path, load_breaker
from circuit_breakers.errors import ArtifactError, BreakerMismatchError

Forge = Callable[[str, bytes], Path]

# Printed by tests/golden/make_breaker_v1.py when the directory was made.
GOLDEN_DIGEST = "075e6401875af8c152a8675fd4e798f5985ed7e9e483ecc0897b99f3672002cd"


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
