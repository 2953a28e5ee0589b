"""The fuzz targets take real files, and no mutation of one gets past them in the wrong way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .targets import TARGETS, mutated

ROOT = Path(__file__).parents[2]
NUM_MUTANTS = 60
EVERY = pytest.mark.parametrize("name", TARGETS)


@EVERY
def test_accepts_its_seeds(name: str) -> None:
    target = TARGETS[name]
    assert target.seeds
    assert [target.check(seed) for seed in target.seeds] == [True] * len(target.seeds)


@EVERY
def test_refuses_what_is_no_such_file(name: str) -> None:
    check = TARGETS[name].check
    assert [check(data) for data in (b"", b"\0", b"\1", b"\xff" * 9, b"{}")].count(True) <= 1


@EVERY
def test_holds_on_mutations_of_its_seeds(name: str) -> None:
    """The same ones in every run; atheris looks for others (run.py)."""
    target = TARGETS[name]
    verdicts: list[bool] = []

    @settings(
        max_examples=NUM_MUTANTS,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(target.seeds), st.randoms(use_true_random=False))
    def hold(seed: bytes, chance: random.Random) -> None:
        verdicts.append(target.check(mutated(seed, target.words, chance)))

    hold()
    assert len(verdicts) >= NUM_MUTANTS
    assert verdicts.count(False) > NUM_MUTANTS // 4, "the mutations reach the checks"


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs requirements/fuzz.txt")
def test_atheris_runs_a_target(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "key", "--seconds", "1"]
    done = subprocess.run(
        [*command, "--corpus", str(tmp_path / "corpus")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = (x for x in done.stderr.splitlines() if x.startswith("stat::number_of_executed"))
    assert int(runs.rpartition(":")[2]) > 100
