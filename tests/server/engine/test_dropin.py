"""vLLM's own EngineArgs and a breaker in the short form: guarded, refused, or left untouched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine import dropin
from circuit_breakers.engine.breaker_request import (
    BreakerRequest,
    is_requested,
    requested_breaker,
)
from circuit_breakers.engine.config import EngineGuardConfig, check_merged_checkpoint
from circuit_breakers.engine.launch import WORKER_EXTENSION, EngineSettings, engine_arguments
from circuit_breakers.errors import (
    ArtifactError,
    BreakerMismatchError,
    CalibrationError,
    ConfigError,
    ModelError,
    UnsupportedEngineError,
)
from circuit_breakers.models import ResolvedModel

from ...vllm_release import needs_vllm_0_32
from .conftest import write_breaker

pytestmark = needs_vllm_0_32

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    # As vLLM's command line does, before it makes any arguments.
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BREAKER", "MODE", "ADAPTER", "TARGET_FPR"):
        monkeypatch.delenv(f"CIRCUIT_BREAKERS_{name}", raising=False)


def engine_args(breaker: Breaker | None = None, **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    if breaker is not None:
        short = {"circuit_breakers": {"breaker": str(breaker.path)}}
        changes["additional_config"] = changes.get("additional_config", {}) | short
    return EngineArgs(**({"model": MODEL, "max_model_len": 256} | changes))


def test_key_of_additional_config_makes_a_guarded_engine(breaker: Breaker) -> None:
    args = engine_args(breaker, additional_config={"other": 1})
    config = args.create_engine_config()
    guard = EngineGuardConfig.from_vllm_config(config)
    assert guard == EngineGuardConfig(
        breaker_path=str(breaker.path.resolve()),
        breaker_digest=breaker.digest,
        mode="enforce",
        adapter="merged",
    )
    assert config.additional_config["other"] == 1
    check_merged_checkpoint(Path(config.model_config.model), breaker)
    assert config.model_config.tokenizer == config.model_config.model
    assert config.parallel_config.worker_extension_cls == WORKER_EXTENSION
    assert config.model_config.logprobs_mode == "processed_logprobs"
    assert config.model_config.generation_config == "vllm"


def test_model_is_served_under_the_name_that_was_typed(breaker: Breaker) -> None:
    assert engine_args(breaker).create_engine_config().model_config.served_model_name == MODEL
    named = engine_args(breaker, served_model_name=["mine", "other"])
    assert named.create_engine_config().model_config.served_model_name == "mine"


def test_variables_do_the_same(breaker: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_BREAKER", str(breaker.path))
    monkeypatch.setenv("CIRCUIT_BREAKERS_MODE", "observe")
    guard = EngineGuardConfig.from_vllm_config(engine_args().create_engine_config())
    assert guard is not None
    assert (guard.breaker_digest, guard.mode) == (breaker.digest, "observe")


def test_the_promise_travels_to_the_engine(
    breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_BREAKER", str(breaker.path))
    monkeypatch.setenv("CIRCUIT_BREAKERS_TARGET_FPR", "0.05")
    guard = EngineGuardConfig.from_vllm_config(engine_args().create_engine_config())
    assert guard is not None
    assert guard.target_fpr == 0.05
    # The same said twice is one answer; another is none.
    entry = {"breaker": str(breaker.path), "target_fpr": 0.05}
    engine_args(additional_config={"circuit_breakers": entry}).create_engine_config()
    entry["target_fpr"] = 0.01
    with pytest.raises(ConfigError, match=r"TARGET_FPR says '0\.05'.*says 0\.01"):
        engine_args(additional_config={"circuit_breakers": entry})


def test_a_promise_beyond_the_data_ends_the_start(breaker: Breaker) -> None:
    entry = {"breaker": str(breaker.path), "target_fpr": 0.001}
    args = engine_args(additional_config={"circuit_breakers": entry})
    with pytest.raises(CalibrationError, match=r"expected one of 0\.05, 0\.01 or more"):
        args.create_engine_config()


def test_async_arguments_are_guarded_too(breaker: Breaker) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(
        model=MODEL,
        max_model_len=256,
        additional_config={"circuit_breakers": {"breaker": str(breaker.path)}},
    )
    assert EngineGuardConfig.from_vllm_config(args.create_engine_config()) is not None


def test_a_second_config_of_the_same_arguments_is_the_same(breaker: Breaker) -> None:
    args = engine_args(breaker)
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert first.model_config.model == second.model_config.model


def test_dynamic_adapter_serves_the_base_model_with_lora(
    smollm2: ResolvedModel, breaker: Breaker
) -> None:
    entry = {"breaker": str(breaker.path), "adapter": "dynamic"}
    config = engine_args(additional_config={"circuit_breakers": entry}).create_engine_config()
    assert config.model_config.model == str(smollm2.path)
    assert config.lora_config.max_loras == 1
    # The adapter of these tests has rank 2; 8 is the smallest that vLLM has.
    assert config.lora_config.max_lora_rank == 8


def test_without_a_breaker_nothing_changes(
    smollm2: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mode alone names no breaker.
    monkeypatch.setenv("CIRCUIT_BREAKERS_MODE", "observe")
    monkeypatch.setenv("CIRCUIT_BREAKERS_BREAKER", "")
    args = engine_args(model=str(smollm2.path))
    before = dataclasses.asdict(args)
    config = args.create_engine_config()
    assert config.additional_config == {}
    assert config.model_config.model == before["model"] == str(smollm2.path)
    assert config.parallel_config.worker_extension_cls == ""
    assert config.model_config.logprobs_mode == "raw_logprobs"


def test_full_form_is_left_alone(
    smollm2: ResolvedModel, breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `circuit-breakers serve --breaker A` with another one in the variable: the flag has won.
    monkeypatch.setenv("CIRCUIT_BREAKERS_BREAKER", "/nowhere")
    settings = EngineSettings(max_model_len=256, served_name="smollm2")
    arguments = engine_arguments(settings, smollm2, breaker)
    config = engine_args(**arguments).create_engine_config()
    assert config.additional_config == arguments["additional_config"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"worker_extension_cls": "some.Extension"}, "worker_extension_cls 'some.Extension'"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        ({"generation_config": "/some/where"}, "generation_config"),
        ({"load_format": "dummy"}, "load_format 'dummy'"),
        ({"hf_overrides": {"num_hidden_layers": 2}}, "hf_overrides"),
        ({"enable_lora": True}, "enable_lora"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"runner": "pooling"}, "runner 'pooling'"),
    ],
)
def test_argument_that_contradicts_the_guard_is_refused(
    breaker: Breaker, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"got {named}.*remove it"):
        engine_args(breaker, **changes).create_engine_config()


def test_tokenizer_of_another_model_is_refused(
    breaker: Breaker, smollm2: ResolvedModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="calibrated on its tokens"):
        engine_args(breaker, tokenizer=str(tmp_path)).create_engine_config()
    own = engine_args(breaker, tokenizer=str(smollm2.path)).create_engine_config()
    assert own.model_config.tokenizer == own.model_config.model


def test_engine_mode_that_the_guard_is_not_tested_with_is_refused(breaker: Breaker) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    scheduler = "vllm.v1.core.sched.scheduler.Scheduler"
    with pytest.raises(UnsupportedEngineError):
        engine_args(
            breaker, speculative_config=ngram, scheduler_cls=scheduler
        ).create_engine_config()


def test_more_than_one_api_server_is_refused(breaker: Breaker) -> None:
    args = engine_args(breaker)
    args._api_process_count = 2  # as `vllm serve --api-server-count 2` sets it
    with pytest.raises(UnsupportedEngineError, match=r"2 API servers.*--api-server-count 1"):
        args.create_engine_config()


@pytest.mark.parametrize(
    "switch",
    ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_USE_RUST_FRONTEND"],
)
def test_switch_that_opens_a_way_around_is_refused(
    breaker: Breaker, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    # Where an engine has run, vLLM reads its variables no more.
    envs.disable_envs_cache()
    monkeypatch.setenv(switch, "1")
    with pytest.raises(UnsupportedEngineError, match=switch):
        engine_args(breaker).create_engine_config()


def test_breaker_of_another_model_is_refused(
    smollm2: ResolvedModel, adapter_dir: Path, tmp_path: Path
) -> None:
    wider = dataclasses.replace(smollm2, hidden_size=640)
    other = write_breaker(tmp_path / "other", wider, adapter_dir, (1e9, 1e9))
    with pytest.raises(BreakerMismatchError, match="hidden_size=640"):
        engine_args(other).create_engine_config()


def test_altered_breaker_is_refused(
    smollm2: ResolvedModel, adapter_dir: Path, tmp_path: Path
) -> None:
    breaker = write_breaker(tmp_path / "altered", smollm2, adapter_dir, (1e9, 1e9))
    probes = breaker.path / "probes.safetensors"
    probes.write_bytes(probes.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match="altered"):
        engine_args(breaker).create_engine_config()


def test_model_that_cannot_be_found_is_refused(breaker: Breaker) -> None:
    with pytest.raises(ModelError, match="smolm2"):
        engine_args(breaker, model="smolm2").create_engine_config()


@pytest.mark.parametrize(
    ("entry", "variables", "message"),
    [
        ({"breaker": "/a"}, {"BREAKER": "/b"}, "BREAKER says '/b'.*says '/a'"),
        ({"breaker": "/a", "mode": "observe"}, {"MODE": "enforce"}, "MODE says 'enforce'"),
        ({"breaker": "/a", "modus": "observe"}, {}, "modus"),
        ({"breaker": "/a", "mode": "off"}, {}, "mode"),
        ({"mode": "observe"}, {}, "breaker: field required"),
        ("/a", {}, "got a str"),
        (None, {"BREAKER": "/a", "ADAPTER": "none"}, "adapter"),
    ],
)
def test_request_that_is_unclear_is_refused(
    entry: Any, variables: dict[str, str], message: str
) -> None:
    additional_config = {} if entry is None else {"circuit_breakers": entry}
    environ = {f"CIRCUIT_BREAKERS_{name}": value for name, value in variables.items()}
    with pytest.raises(ConfigError, match=message):
        requested_breaker(additional_config, environ)


def test_key_and_variables_complete_each_other() -> None:
    both = requested_breaker(
        {"circuit_breakers": {"breaker": "/a/../a"}},
        {"CIRCUIT_BREAKERS_BREAKER": "/a", "CIRCUIT_BREAKERS_MODE": "observe"},
    )
    assert both == BreakerRequest(breaker=Path("/a/../a"), mode="observe")


def test_full_form_counts_as_a_request(breaker: Breaker) -> None:
    full = {"circuit_breakers": {"breaker_path": "x", "breaker_digest": "y"}}
    assert is_requested(full, {})
    assert not is_requested({}, {})
    assert not is_requested({}, {"CIRCUIT_BREAKERS_MODE": "observe"})


def test_endpoint_plugin_is_loaded_once_a_breaker_is_configured(
    breaker: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import plugins

    loader: Callable[..., list[Any]] = plugins.load_endpoint_plugins
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    engine_args(breaker).create_engine_config()
    assert [plugin.name for plugin in loader(("generate",))] == [dropin.ENDPOINT_PLUGIN]
    # Named in vLLM's own list, it is there once as well.
    monkeypatch.setenv("VLLM_PLUGINS", "circuit_breakers")
    assert [plugin.name for plugin in loader(("generate",))] == [dropin.ENDPOINT_PLUGIN]


def test_additional_config_survives_as_json(breaker: Breaker) -> None:
    # vLLM hashes it into its compile-cache key.
    config = engine_args(breaker).create_engine_config()
    assert json.loads(json.dumps(config.additional_config)) == config.additional_config
