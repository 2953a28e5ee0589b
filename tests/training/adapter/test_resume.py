"""A training run that is killed, and what goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter
from circuit_breakers_training.data.jsonl import write_conversations
from circuit_breakers_training.run_log import read_metrics

from ..tiny_recipes import LLAMA, Conversations

pytestmark = pytest.mark.usefixtures("one_thread")


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if k not in ("seconds", "peak_rss_mib")}
        for entry in metrics
    ]


RESUMABLE = LLAMA.model_copy(
    update={
        "steps": 80,
        "checkpoint_every": 5,
        "lora": LLAMA.lora.model_copy(update={"dropout": 0.1}),
    }
)
CHILD = """
import sys, torch
from pathlib import Path
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.data.jsonl import read_conversations
from circuit_breakers_training.adapter.trainer import TrainingRows, train_adapter

torch.set_num_threads(1)
data = Path(sys.argv[3])
train_adapter(
    Recipe.model_validate_json(sys.argv[1]),
    model_dir=Path(sys.argv[2]),
    rows=TrainingRows(
        retain=read_conversations(data / "retain"), harmful=read_conversations(data / "harmful")
    ),
    out=Path(sys.argv[4]),
)
"""


@pytest.fixture(scope="module")
def killed(
    tiny_llama: Path, conversations: Conversations, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output directory of a run that SIGKILL stopped between two checkpoints."""
    base = tmp_path_factory.mktemp("killed")
    for name in ("retain", "harmful"):
        write_conversations(base / name, conversations[name])
    out = base / "out"
    command = [sys.executable, "-c", CHILD, RESUMABLE.model_dump_json(), tiny_llama, base, out]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 12:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (out / "checkpoint.safetensors").exists()
    return out


def copied(run: Path, to: Path) -> Path:
    for file in run.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path
) -> None:
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    out = copied(killed, tmp_path / "resumed")
    # A kill may leave half a line and a half-written checkpoint.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    (out / ".checkpoint.safetensors.partial").write_bytes(b"half")
    before = read_metrics(out / "metrics.jsonl")
    resumed = train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=out)
    whole = train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=tmp_path / "whole")

    ours = read_metrics(resumed.metrics_path)
    # The first checkpoints' steps were not run again: even their times are as they were.
    assert ours[:10] == before[:10]
    assert without_time(ours) == without_time(read_metrics(whole.metrics_path))
    a = load_file(resumed.adapter_dir / "adapter_model.safetensors")
    b = load_file(whole.adapter_dir / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("change", ["recipe", "data", "weights"])
def test_checkpoint_of_another_run_is_refused(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path, change: str
) -> None:
    out = copied(killed, tmp_path)
    recipe, harmful, revision = RESUMABLE, conversations["harmful"], ""
    if change == "recipe":
        recipe = recipe.model_copy(update={"learning_rate": 2e-2})
    elif change == "data":
        harmful = harmful[1:]
    else:
        revision = "other"
    rows = TrainingRows(retain=conversations["retain"], harmful=harmful)
    with pytest.raises(ConfigError, match="run with other settings, weights or data"):
        train_adapter(recipe, model_dir=tiny_llama, rows=rows, out=out, revision=revision)


def test_damaged_checkpoint_is_refused(
    tiny_llama: Path, conversations: Conversations, killed: Path, tmp_path: Path
) -> None:
    out = copied(killed, tmp_path)
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    rows = TrainingRows(retain=conversations["retain"], harmful=conversations["harmful"])
    with pytest.raises(ConfigError, match=r"is damaged .* delete it to train from the start"):
        train_adapter(RESUMABLE, model_dir=tiny_llama, rows=rows, out=out)
