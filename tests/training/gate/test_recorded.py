"""What is read from artifacts: the shipped one's own record, and one that records nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from circuit_breakers.artifact import builtin_breaker_path, load_breaker
from circuit_breakers_training.gate.capability import capability
from circuit_breakers_training.gate.identity import identity

from .conftest import MakeTarget, ScriptedServer

GOLDEN = Path(__file__).parents[2] / "golden" / "breaker-v1"


def test_the_change_of_perplexity_is_the_mean_of_the_kinds(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    # The word breaker records 4.0 and 4.04 for one kind (breaker_for_words.py).
    mean, kind = capability(make_target(scripted))
    assert (mean.value, mean.count, mean.passed) == (pytest.approx(0.01), 1, True)
    assert (kind.name, kind.value) == ("benign: topic", pytest.approx(0.01))


def test_harmful_texts_are_no_part_of_it(scripted: ScriptedServer, make_target: MakeTarget) -> None:
    path = builtin_breaker_path("smollm2-135m-instruct")
    assert path is not None
    target = replace(make_target(scripted), breaker=load_breaker(path))
    mean, *kinds = capability(target)
    assert all(kind.name.startswith(("benign: ", "refused: ")) for kind in kinds)
    assert mean.count == len(kinds) > 1
    changes = [kind.value for kind in kinds if isinstance(kind.value, float)]
    # The shipped breaker's texts of harm have thousands of times the perplexity, harmless ones
    # behind a refused request twice.
    assert isinstance(mean.value, float)
    assert min(changes) <= mean.value <= max(changes) < 100


def test_an_artifact_that_records_nothing_proves_nothing(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    target = replace(make_target(scripted), breaker=load_breaker(GOLDEN))
    (row,) = capability(target)
    assert (row.value, row.count, row.passed) == (None, 0, False)
    assert row.notes == ("the artifact has no perplexity in metrics.json",)
    overlap = next(row for row in identity(target) if row.name == "overlap")
    assert (overlap.value, overlap.passed) == (None, False)
    assert "does not say which prompts" in overlap.notes[0]


def test_the_mode_and_the_readiness_of_the_server_count(
    scripted: ScriptedServer, make_target: MakeTarget
) -> None:
    target = make_target(scripted)
    scripted.answers[("GET", "/readyz")] = (503, {})
    observed = replace(target, served={**target.served, "mode": "observe"})
    assert [row.name for row in identity(observed) if not row.passed] == ["mode", "ready"]
    # vLLM's own server has no /readyz.
    del scripted.answers[("GET", "/readyz")]
    scripted.answers[("GET", "/health")] = (200, "")
    assert [row.name for row in identity(target) if not row.passed] == []
