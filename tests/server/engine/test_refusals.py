"""The engine refuses, before it loads anything, whatever could leave a token without its score."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.compat import (
    TESTED_VLLM,
    check_engine_config,
    check_scheduler,
    check_vllm_version,
    decoder_layers,
)
from circuit_breakers.engine.config import EngineGuardConfig, check_merged_checkpoint
from circuit_breakers.engine.launch import EngineSettings, engine_arguments
from circuit_breakers.errors import (
    BreakerMismatchError,
    ConfigError,
    UnsupportedEngineError,
)
from circuit_breakers.models import ResolvedModel

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def engine_config(arguments: dict[str, Any], **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**(arguments | changes)).create_engine_config()


@pytest.fixture(scope="module")
def arguments(smollm2: ResolvedModel, breaker: Breaker) -> dict[str, Any]:
    settings = EngineSettings(max_model_len=256, served_name="smollm2")
    return engine_arguments(settings, smollm2, breaker)


def test_default_configuration_is_accepted(arguments: dict[str, Any]) -> None:
    check_engine_config(engine_config(arguments))


def test_custom_scheduler_class_is_refused_by_name(arguments: dict[str, Any]) -> None:
    name = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    with pytest.raises(UnsupportedEngineError, match=r"scheduler class .*AsyncScheduler"):
        check_engine_config(engine_config(arguments, scheduler_cls=name))


def test_only_the_tested_drafter_may_speculate(arguments: dict[str, Any]) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    config = engine_config(arguments, speculative_config=ngram)
    check_engine_config(config)
    config.speculative_config.method = "eagle"
    with pytest.raises(UnsupportedEngineError, match="speculative decoding by 'eagle'"):
        check_engine_config(config)


def test_every_untested_mode_is_named_at_once(arguments: dict[str, Any]) -> None:
    config = engine_config(arguments)
    config.parallel_config.enable_dbo = True
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(UnsupportedEngineError, match=r"dual batch overlap.*context parallelism"):
        check_engine_config(config)


def test_scheduler_of_another_plugin_is_refused_by_name() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    class OtherScheduler(Scheduler):
        pass

    scheduler = object.__new__(OtherScheduler)
    with pytest.raises(UnsupportedEngineError, match=r"test_refusals\.\S*OtherScheduler"):
        check_scheduler(scheduler)


def test_vllm_outside_the_tested_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    assert check_vllm_version() == vllm.__version__
    for version in ("0.31.0", "0.32.1"):
        monkeypatch.setattr(vllm, "__version__", version)
        assert check_vllm_version() == version
    for version in ("0.30.9", "0.33.0", "0.310.0", "0.320.0", "1.0.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(UnsupportedEngineError, match=rf"{version}.*tested: 0\.31\.x, 0\.32\.x"):
            check_vllm_version()


def test_the_packages_range_is_the_tested_one() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    (engine,) = (r for r in project["optional-dependencies"]["serve"] if r.startswith("vllm"))
    major, minor = TESTED_VLLM[-1].split(".")
    assert engine == f"vllm>={TESTED_VLLM[0]},<{major}.{int(minor) + 1}"


def test_unmerged_checkpoint_is_refused(smollm2: ResolvedModel, breaker: Breaker) -> None:
    with pytest.raises(BreakerMismatchError, match="no merged adapter"):
        check_merged_checkpoint(smollm2.path, breaker)


def test_breaker_changed_after_launch_is_refused(breaker: Breaker) -> None:
    config = EngineGuardConfig(
        breaker_path=str(breaker.path), breaker_digest="0" * 64, mode="enforce", adapter="merged"
    )
    with pytest.raises(BreakerMismatchError, match="changed after launch"):
        config.load_breaker()


@pytest.mark.parametrize(
    "entry",
    [
        {"breaker_path": "x"},
        {"breaker_path": "x", "breaker_digest": "", "mode": "off", "adapter": "merged"},
        *(
            {
                "breaker_path": "x",
                "breaker_digest": "",
                "mode": "enforce",
                "adapter": "merged",
                "target_fpr": target_fpr,
            }
            for target_fpr in ("0.01", 0.0, 1.0)
        ),
    ],
)
def test_malformed_engine_entry_is_refused(
    arguments: dict[str, Any], entry: dict[str, Any]
) -> None:
    config = engine_config(arguments, additional_config={"circuit_breakers": entry})
    with pytest.raises(ConfigError, match="circuit_breakers"):
        EngineGuardConfig.from_vllm_config(config)


def test_no_entry_means_no_breaker(arguments: dict[str, Any]) -> None:
    assert (
        EngineGuardConfig.from_vllm_config(engine_config(arguments, additional_config={})) is None
    )


def test_breaker_of_another_model_is_refused(smollm2: ResolvedModel, breaker: Breaker) -> None:
    other = dataclasses.replace(smollm2, hidden_size=640, config_sha256="0" * 64)
    with pytest.raises(BreakerMismatchError):
        breaker.check_fits(other.spec())


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="no decoder blocks"):
        decoder_layers(object())
