"""Writes the tiny breaker of tests/golden/breaker-v1: python tests/golden/make_breaker_v1.py DIR

Kept to show how the golden directory was made. The directory itself is never made again: it
stands for the breakers that users already have.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from circuit_breakers.artifact import (
    Aggregation,
    BaseModelSpec,
    Breaker,
    Calibration,
    Canary,
    Message,
    ProbeSpec,
    ProbeWeights,
    save_breaker,
)

HIDDEN_SIZE = 8
CALIBRATION = Calibration(
    # Clopper-Pearson: 1 - 0.05 ** (1 / 300) for 0 trips in 300.
    target_fpr=0.01,
    num_conversations=300,
    num_trips=0,
    fpr_upper_bound=0.00994,
    max_tokens=256,
)


def write_adapter(out: Path) -> Path:
    """A rank-2 LoRA of one projection as PEFT writes it, with its README and a set's order."""
    out.mkdir()
    rng = np.random.default_rng(1)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": rng.normal(size=(2, HIDDEN_SIZE)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(HIDDEN_SIZE, 2)).astype(np.float32),
    }
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": "/somewhere/on/a/machine",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "q_proj"],
        "layers_to_transform": [0],
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    (out / "README.md").write_text("PEFT writes a model card here.\n")
    return out


def breaker_parts(adapter_dir: Path) -> dict[str, Any]:
    """Arguments of save_breaker for a two-probe breaker of a model with 4 blocks and width 8."""
    return {
        "name": "golden",
        "base_model": BaseModelSpec(
            id="org/tiny",
            revision="abc123",
            config_sha256="0" * 64,
            num_layers=4,
            hidden_size=HIDDEN_SIZE,
        ),
        "recipe": {"steps": 3, "alpha": 10.0, "target_layers": [1, 2]},
        "data_sha256": {"train": "1" * 64, "calibration": "2" * 64},
        "probes": [
            ProbeSpec(
                name="layer1",
                layer=1,
                aggregation=Aggregation(kind="max"),
                threshold_logit=2.5,
                calibration=CALIBRATION,
            ),
            ProbeSpec(
                name="layer2",
                layer=2,
                aggregation=Aggregation(kind="ema", alpha=0.25, skip_tokens=4),
                threshold_logit=-1.0,
                calibration=CALIBRATION,
            ),
        ],
        "weights": {
            "layer1": ProbeWeights(np.arange(HIDDEN_SIZE, dtype=np.float32) / 4, -0.5),
            "layer2": ProbeWeights(-np.ones(HIDDEN_SIZE, np.float32), 0.25),
        },
        "adapter_dir": adapter_dir,
        "canaries": [
            Canary(
                messages=(
                    Message(role="user", content="a harmful request"),
                    Message(role="assistant", content="a harmful answer"),
                ),
                label="harmful",
            ),
            Canary(messages=(Message(role="user", content="What is 2 + 2? ✓"),), label="benign"),
        ],
        "extra_files": {"report.md": b"# Report\n", "plots/loss.png": b"\x89PNG\r\n\x1a\n"},
        "created": datetime(2026, 11, 24, 12, tzinfo=UTC),
    }


def make(out: Path) -> Breaker:
    with tempfile.TemporaryDirectory() as scratch:
        return save_breaker(out, **breaker_parts(write_adapter(Path(scratch) / "adapter")))


if __name__ == "__main__":
    print(make(Path(sys.argv[1])).digest)
