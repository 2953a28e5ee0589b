"""One guarded engine inside the test process, over the real model, shared by all engine tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

# Before anything imports vllm: the engine core runs in this process, on one thread.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    NUMBA_NUM_THREADS="1",
)

from .cpu_modes import RUNNER_V2, async_scheduling_on_cpu, use_runner_v2

if RUNNER_V2:
    use_runner_v2()

from circuit_breakers.artifact import Breaker, ProbeWeights, save_breaker
from circuit_breakers.artifact.manifest import (
    Aggregation,
    Calibration,
    Canary,
    Message,
    OperatingPoint,
    ProbeSpec,
)
from circuit_breakers.models import ResolvedModel

if TYPE_CHECKING:
    from . import tiny

PROBE_LAYERS = ((4,), (11, 17))
"""One probe of a single layer, one of two."""
CALIBRATION = Calibration(
    target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=256
)


def write_adapter(out: Path, model: ResolvedModel, scale: float) -> Path:
    """A rank-2 LoRA on the query projections of the first two blocks, in PEFT's format."""
    rng = np.random.default_rng(1)
    out.mkdir(parents=True)
    tensors = {}
    for block in (0, 1):
        prefix = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        shape_a, shape_b = (2, model.hidden_size), (model.hidden_size, 2)
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.05, shape_a).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, scale, shape_b).astype(np.float32)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": 2,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 1],
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def with_curve(threshold: float) -> Calibration:
    """CALIBRATION, and a looser promise that is kept at half the threshold."""
    # Clopper-Pearson bounds of 8 and 0 trips in 300.
    points = ((0.05, threshold / 2, 8, 0.04761), (0.01, threshold, 0, 0.00994))
    curve = tuple(
        OperatingPoint(
            target_fpr=target_fpr,
            threshold_logit=logit,
            num_conversations=300,
            num_trips=num_trips,
            fpr_upper_bound=bound,
        )
        for target_fpr, logit, num_trips, bound in points
    )
    return CALIBRATION.model_copy(update={"curve": curve})


def write_breaker(
    out: Path, model: ResolvedModel, adapter_dir: Path, thresholds: Sequence[float]
) -> Breaker:
    """A breaker with one random probe for each of PROBE_LAYERS."""
    rng = np.random.default_rng(2)
    specs, weights = [], {}
    for layers, threshold in zip(PROBE_LAYERS, thresholds, strict=True):
        name = f"layer{layers[-1]}"
        alone = len(layers) == 1
        specs.append(
            ProbeSpec(
                name=name,
                layer=layers[0] if alone else None,
                layers=None if alone else layers,
                aggregation=Aggregation(kind="max"),
                threshold_logit=threshold,
                calibration=with_curve(threshold),
            )
        )
        shape = (model.hidden_size,) if alone else (len(layers), model.hidden_size)
        weights[name] = ProbeWeights(
            rng.normal(0, 0.02, shape).astype(np.float32), 0.25 * layers[-1]
        )
    return save_breaker(
        out,
        name="test-breaker",
        base_model=model.spec(),
        recipe={},
        data_sha256={},
        probes=specs,
        weights=weights,
        adapter_dir=adapter_dir,
        canaries=(
            Canary(messages=(Message(role="user", content="harm"),), label="harmful"),
            Canary(messages=(Message(role="user", content="hello"),), label="benign"),
        ),
        extra_files={},
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rigs last, ngram at the very end: vLLM cannot start an engine after numba is loaded."""
    items.sort(key=lambda item: "rig" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def adapter_dir(smollm2: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", smollm2, 0.05)


@pytest.fixture(scope="session")
def breaker(
    smollm2: ResolvedModel, adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Breaker:
    """Thresholds out of reach: tests lower them on the live guard."""
    return write_breaker(
        tmp_path_factory.mktemp("breaker") / "breaker", smollm2, adapter_dir, (1e9, 1e9)
    )


@pytest.fixture(scope="session")
def llm(smollm2: ResolvedModel, breaker: Breaker) -> Iterator[Any]:
    """float32, prefix cache on, 64 tokens a step, so that every longer prompt is chunked."""
    from vllm import LLM

    from circuit_breakers.engine.launch import EngineSettings, engine_arguments

    settings = EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        served_name="smollm2",
    )
    engine = LLM(**engine_arguments(settings, smollm2, breaker), disable_log_stats=True)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def reference(smollm2: ResolvedModel, breaker: Breaker) -> Callable[[Sequence[int]], Any]:
    """Logits (T, P) of a token sequence by transformers: the slow oracle."""
    import torch
    from transformers import AutoModelForCausalLM

    from circuit_breakers.engine.merge import merged_checkpoint

    model = AutoModelForCausalLM.from_pretrained(
        merged_checkpoint(smollm2, breaker), dtype=torch.float32, local_files_only=True
    ).eval()

    def logits(token_ids: Sequence[int]) -> Any:
        with torch.no_grad():
            hidden = model(torch.tensor([list(token_ids)]), output_hidden_states=True).hidden_states
        columns = []
        for spec in breaker.manifest.probes:
            weights = breaker.weights[spec.name]
            parts = [
                hidden[layer + 1][0].numpy() @ weight_D
                for layer, weight_D in zip(spec.read_layers, weights.weight_LD, strict=True)
            ]
            columns.append(sum(parts) + weights.bias)
        return np.stack(columns, axis=1)

    return logits


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "async": {"async_scheduling": True},
    "sliding-window": {},
    "ngram": {"speculative_config": _NGRAM | {"prompt_lookup_min": 1}},
}


@pytest.fixture(scope="session", params=list(_MODES))
def rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tiny.Rig]:
    """A tiny engine in each mode that changes how requests are scheduled, with its oracle."""
    from . import tiny

    mode: str = request.param
    if RUNNER_V2 and mode == "ngram":
        pytest.skip("model runner V2 drafts with its own speculators")
    root = tmp_path_factory.mktemp(mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIRCUIT_BREAKERS_CACHE", str(root / "cache"))
        write = tiny.write_gemma3 if mode == "sliding-window" else tiny.write_llama
        model = write(root / "model")
        breaker = tiny.write_tiny_breaker(root / "breaker", model)
        with async_scheduling_on_cpu() if mode == "async" else nullcontext():
            llm = tiny.tiny_engine(model, breaker, **_MODES[mode])
        oracle = tiny.Oracle(model, breaker)
    core = tiny.core_of(llm)
    assert (core.step_fn == core.step_with_batch_queue) == (mode == "async")
    if mode == "sliding-window":
        assert len(core.scheduler.kv_cache_config.kv_cache_groups) > 1
    yield tiny.Rig(llm, oracle)
    llm.llm_engine.engine_core.shutdown()
