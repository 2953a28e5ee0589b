from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import is_deepspeed_available

from circuit_breakers.errors import ConfigError
from circuit_breakers_training.processes import Processes
from circuit_breakers_training.recipes.config import Recipe

RECIPE = Recipe(model="tiny", precision="fp32")


def test_one_process_without_a_launcher() -> None:
    processes = Processes(RECIPE)
    assert (processes.index, processes.count, processes.is_main) == (0, 1, True)
    assert processes.is_plain
    assert str(processes.device) == "cpu"
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.add_up([1.5, 2]) == [1.5, 2]
    assert processes.agreed(4, "files") == 4
    processes.leave()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "the recipe's precision is fp32"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "choose in the recipe"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set micro_batch_size in the recipe"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set compile = true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "set gradient_checkpointing = true"),
    ],
)
def test_launcher_setting_that_the_recipe_decides_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        Processes(RECIPE)


def test_sharding_that_would_not_happen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="it shards on several GPUs only"):
        Processes(RECIPE)


@pytest.mark.skipif(is_deepspeed_available(), reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="not installed here"):
        Processes(RECIPE)


CONFIG_FILES = Path(__file__).parents[2] / "training" / "accelerate"


@pytest.mark.parametrize(
    ("name", "mode"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")]
)
def test_config_files_are_accelerates(name: str, mode: str) -> None:
    config = load_config_from_file(str(CONFIG_FILES / f"{name}.yaml"))
    assert config.distributed_type.value == mode
    assert config.mixed_precision == "no"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
