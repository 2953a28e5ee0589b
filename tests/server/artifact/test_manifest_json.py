from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.artifact import Breaker, load_breaker
from circuit_breakers.artifact.manifest_json import manifest_from_json, manifest_to_json
from circuit_breakers.errors import ArtifactError

EditManifest = Callable[[Callable[[Any], None]], Path]


def set_at(*path: str | int, value: object) -> Callable[[Any], None]:
    """A change that sets manifest[path[0]][path[1]]... to `value`."""

    def change(manifest: Any) -> None:
        for part in path[:-1]:
            manifest = manifest[part]
        manifest[path[-1]] = value

    return change


def reads(*layers: int) -> Callable[[Any], None]:
    """A change that makes the first probe read several layers."""

    def change(manifest: Any) -> None:
        del manifest["probes"][0]["layer"]
        manifest["probes"][0]["layers"] = list(layers)

    return change


def curve(*points: tuple[float, float], of_all: bool = True) -> Callable[[Any], None]:
    """A change that gives the first probe, or every one, a curve of (target_fpr, threshold)."""

    def change(manifest: Any) -> None:
        manifest["probes"][1]["threshold_logit"] = manifest["probes"][0]["threshold_logit"]
        for probe in manifest["probes"][: None if of_all else 1]:
            probe["calibration"]["curve"] = [
                {
                    "target_fpr": target_fpr,
                    "threshold_logit": threshold,
                    "num_conversations": 300,
                    "num_trips": 0,
                    "fpr_upper_bound": 0.00994,
                }
                for target_fpr, threshold in points
            ]

    return change


def histogram(edges: list[float], counts: list[int]) -> Callable[[Any], None]:
    """A change that gives the first probe's calibration a histogram of both phases."""
    one = {"edges": edges, "counts": counts}
    return set_at("probes", 0, "calibration", "histogram", value={"prompt": one, "completion": one})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("schema_version", value=2), "got schema_version 2, expected 1; upgrade"),
        (set_at("schema_version", value=0), "got schema_version 0, expected 1; export"),
        (set_at("schema_version", value=True), "got schema_version True, expected 1"),
        (set_at("schema_version", value="1"), "got schema_version '1', expected 1"),
        (set_at("tool", value="x"), "got unknown field 'tool', expected only the fields"),
        (set_at("probes", 0, "extra", value=1), r"got unknown field 'probes\.0\.extra'"),
        (set_at("probes", 0, "layer", value="1"), r"field 'probes\.0\.layer': got '1', expected"),
        (set_at("probes", 0, "layer", value=3), "reads layer 3; a model of 4 layers allows 0 to 2"),
        (lambda m: m["probes"][0].pop("layer"), "layer None and layers None, expected exactly one"),
        (
            set_at("probes", 0, "layers", value=[1, 2]),
            r"layer 1 and layers \(1, 2\), expected exac",
        ),
        (reads(1, 3), "reads layer 3; a model of 4 layers allows 0 to 2"),
        (reads(1), r"got layers \[1\], expected at least two"),
        (reads(2, 1), r"got layers \[2, 1\], expected at least two, each once, ascending"),
        (reads(1, 1), r"got layers \[1, 1\], expected at least two, each once, ascending"),
        (reads(-1, 1), r"layers\.0': got -1"),
        (curve((0.05, 2.0), (0.05, 2.5)), "expected falling target_fpr"),
        (curve((0.05, 3.0), (0.01, 2.5)), "thresholds that do not fall"),
        (curve((0.05, 2.0)), r"no point of target_fpr 0\.01 and threshold 2\.5 in the curve"),
        (curve((0.01, 2.5), (0.005, 3.0)), r"bound of 0\.00994, expected a bound within"),
        (curve((0.01, 2.5), of_all=False), "curves of different promises; expected the same"),
        (histogram([1.0, 0.0], [1, 2, 3]), r"got edges \[1\.0, 0\.0\], expected them ascending"),
        (histogram([1.0, 1.0], [1, 2, 3]), "expected them ascending, each once"),
        (histogram([0.0, 1.0], [1, 2]), r"got counts \[1, 2\], expected 3 of them"),
        (histogram([0.0], [0, 0]), "not all 0"),
        (histogram([0.0], [-1, 2]), r"counts\.0': got -1"),
        (histogram([], [3]), r"edges': got \[\]"),
        (histogram([0.0], [200, 101]), "histogram of 301 conversations in phase prompt, expected"),
        (
            set_at("probes", 0, "calibration", "histogram", value={"answer": {}}),
            r"histogram\.answer",
        ),
        (set_at("probes", 1, "name", value="layer1"), "probe names must be unique"),
        (set_at("probes", value=[]), "field 'probes': got"),
        (set_at("probes", 0, "aggregation", "kind", value="min"), r"aggregation\.kind': got 'min'"),
        (set_at("probes", 0, "aggregation", "skip_tokens", value=0), "skip_tokens': got 0"),
        (set_at("canaries", value=[]), "canaries need at least one 'harmful' and one 'benign'"),
        (set_at("created", value="yesterday"), "field 'created': got 'yesterday'"),
        (set_at("created", value="0001-01-01T00:00:00"), "got created 0001-.* a year from 1970"),
        (
            set_at("probes", 0, "threshold_logit", value=1e39),
            r"probes\.0\.threshold_logit': got 1e",
        ),
        (
            set_at("probes", 0, "aggregation", value={"kind": "rolling_mean", "window": 10**30}),
            r"aggregation\.window': got 10{30}",
        ),
        (
            set_at("probes", 0, "calibration", "num_conversations", value=10**30),
            r"num_conversations': got 10{30}",
        ),
        (curve((0.05, -1e39), (0.01, 2.5)), r"curve\.0\.threshold_logit': got -1e"),
        (set_at("data_sha256", "train", value="xyz"), r"data_sha256\.train': got 'xyz'"),
        (lambda m: m.pop("recipe"), "field 'recipe' is missing"),
        (lambda m: m.pop("schema_version"), "got schema_version None"),
    ],
)
def test_names_field_got_and_expected(
    change: Callable[[Any], None], message: str, edit_manifest: EditManifest
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_breaker(edit_manifest(change))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "got a JSON list, expected an object"),
        (b'{"schema_version": 1, "schema_version": 1}', "duplicate key 'schema_version'"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b'{"recipe": {"x": 1e999}}', "1e999 is beyond a float"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (8 * 1024 * 1024 + 1), "expected at most"),
    ],
)
def test_refuses_what_is_no_manifest(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        manifest_from_json(data, "manifest.json")


def test_round_trips_byte_for_byte(saved: Breaker) -> None:
    data = (saved.path / "manifest.json").read_bytes()
    assert manifest_to_json(manifest_from_json(data, "manifest.json")) == data


def test_a_breaker_that_needs_no_new_field_has_none(golden_path: Path) -> None:
    """Older versions refuse unknown fields, so what they can serve is written as they know it."""
    data = (golden_path / "manifest.json").read_bytes()
    assert manifest_to_json(manifest_from_json(data, "manifest.json")) == data
    assert b'"layers"' not in data and b'"curve"' not in data
    assert b'"histogram"' not in data


def test_several_layers_and_a_curve_round_trip(edit_manifest: EditManifest) -> None:
    def change(manifest: Any) -> None:
        curve((0.05, 2.0), (0.01, 2.5))(manifest)

    manifest = load_breaker(edit_manifest(change)).manifest
    data = manifest_to_json(manifest)
    assert manifest_from_json(data, "manifest.json") == manifest
    points = manifest.probes[1].calibration.curve
    assert [(p.target_fpr, p.threshold_logit) for p in points] == [(0.05, 2.0), (0.01, 2.5)]


def test_a_histogram_round_trips(edit_manifest: EditManifest) -> None:
    manifest = load_breaker(edit_manifest(histogram([-0.5, 1.25], [100, 150, 50]))).manifest
    assert manifest_from_json(manifest_to_json(manifest), "manifest.json") == manifest
    first, second = manifest.probes
    assert first.calibration.histogram is not None
    assert first.calibration.histogram["completion"].edges == (-0.5, 1.25)
    assert first.calibration.histogram["completion"].counts == (100, 150, 50)
    assert second.calibration.histogram is None


def test_shows_at_most_three_problems(edit_manifest: EditManifest) -> None:
    def change(manifest: Any) -> None:
        manifest.update(a=1, b=2, c=3, d=4, e=5)

    with pytest.raises(ArtifactError, match="and 2 more"):
        load_breaker(edit_manifest(change))
