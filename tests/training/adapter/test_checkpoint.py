"""Files are whole or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuit_breakers.artifact import load_breaker
from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.checkpoint import load_checkpoint, save_checkpoint
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter
from circuit_breakers_training.data.jsonl import Conversation, write_conversations
from circuit_breakers_training.recipes.config import LoraRecipe, Recipe
from circuit_breakers_training.run_log import read_metrics

# Each writes the same file over and over; every tensor of a checkpoint holds its step.
WRITE_CHECKPOINTS = """
import sys, torch
from pathlib import Path
from circuit_breakers_training.adapter.checkpoint import save_checkpoint

for step in range(1_000_000):
    save_checkpoint(
        Path(sys.argv[1]),
        run_digest="d",
        step=step,
        tensors={f"parameter/{i}": torch.full((50_000,), float(step)) for i in range(8)},
    )
"""
WRITE_BREAKERS = """
import sys
from pathlib import Path
from circuit_breakers.artifact import load_breaker, save_breaker

old = load_breaker(Path(sys.argv[2]))
for step in range(1_000_000):
    save_breaker(
        Path(sys.argv[1]),
        name=old.manifest.name,
        base_model=old.manifest.base_model,
        recipe={"step": step},
        data_sha256=old.manifest.data_sha256,
        probes=old.manifest.probes,
        weights=old.weights,
        adapter_dir=old.path / "adapter",
        canaries=old.manifest.canaries,
        extra_files={"report.md": b"x" * 200_000},
        overwrite=True,
    )
"""
GOLDEN = Path(__file__).parents[2] / "golden" / "breaker-v1"


def kill_while_writing(script: str, path: Path, *more: str, half: str | None = None) -> None:
    """Start the script, and SIGKILL it at a random moment once it has written `path` anew.

    Args:
        half: pattern of files beside `path` that are there during a write: the moment is in one.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    before = path.stat().st_mtime_ns if path.exists() else 0
    child = subprocess.Popen([sys.executable, "-c", script, str(path), *more], env=env)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.2))
        while half is not None:
            # Stopped first, so that what is seen is what the kill leaves.
            os.kill(child.pid, signal.SIGSTOP)
            if any(path.parent.glob(half)):
                break
            os.kill(child.pid, signal.SIGCONT)
            assert time.monotonic() < deadline
            time.sleep(random.uniform(0, 0.01))
        assert child.poll() is None
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def test_killed_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    halves = 0  # kills within a write
    for attempt in range(4):
        path = tmp_path / f"checkpoint-{attempt}.safetensors"
        half = f".{path.name}.partial"
        kill_while_writing(WRITE_CHECKPOINTS, path, half=half)
        checkpoint = load_checkpoint(path, run_digest="d")
        assert checkpoint is not None
        assert len(checkpoint.tensors) == 8
        assert all((t == float(checkpoint.step)).all() for t in checkpoint.tensors.values())
        halves += path.with_name(half).exists()
        # The next run writes over what was left.
        save_checkpoint(path, run_digest="d", step=1, tensors={"parameter/0": torch.ones(1)})
        assert not path.with_name(half).exists()
    assert halves > 0


def test_killed_export_leaves_a_whole_breaker_or_none(tmp_path: Path) -> None:
    partials = 0  # kills within an export
    for attempt in range(4):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        path = directory / "breaker"
        kill_while_writing(WRITE_BREAKERS, path, str(GOLDEN), half=".breaker.*")
        # Between two renames there is none, and the old one lies beside it.
        if path.exists():
            assert "step" in load_breaker(path).manifest.recipe
        partials += len(list(directory.glob(".breaker.*")))
    assert partials > 0


TRAIN = """
import json, sys
from pathlib import Path
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.data.jsonl import read_conversations
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter

out, recipe, model_dir, data = sys.argv[1:]
train_adapter(
    Recipe.model_validate_json(recipe),
    model_dir=Path(model_dir),
    rows=TrainingRows(**{p.name: read_conversations(p) for p in sorted(Path(data).iterdir())}),
    out=Path(out).parent,
)
"""


@pytest.mark.usefixtures("one_thread")
def test_run_killed_again_and_again_has_the_losses_of_an_uninterrupted_one(
    tiny_llama: Path, conversations: dict[str, list[Conversation]], tmp_path: Path
) -> None:
    recipe = Recipe(
        model="tiny-llama",
        steps=120,
        batch_size=4,
        max_length=64,
        precision="fp32",
        checkpoint_every=1,
        lora=LoraRecipe(rank=8, b_init_std=0.02, dropout=0.1),
    )
    data = tmp_path / "data"
    data.mkdir()
    for name in ("retain", "harmful"):
        write_conversations(data / name, conversations[name])
    killed = tmp_path / "killed"
    for _ in range(2):
        kill_while_writing(
            TRAIN,
            killed / "metrics.jsonl",
            *(recipe.model_dump_json(), str(tiny_llama), str(data)),
        )
        assert len(read_metrics(killed / "metrics.jsonl")) < recipe.steps
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    ends = [
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=out)
        for out in (killed, tmp_path / "whole")
    ]
    ours, theirs = (read_metrics(end.metrics_path) for end in ends)
    assert len(theirs) == 120
    names = ("step", "loss", "grad_norm", "learning_rate", "reroute_cosine", "retain_cosine")
    assert [[e[n] for n in names] for e in ours] == [[e[n] for n in names] for e in theirs]
    a, b = (load_file(end.adapter_dir / "adapter_model.safetensors") for end in ends)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_checkpoint_of_another_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    metadata = {"version": "1", "run_digest": "d", "step": "3"}
    save_file({"parameter/0": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(ConfigError, match="format 1, expected 2"):
        load_checkpoint(path, run_digest="d")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", run_digest="d") is None
