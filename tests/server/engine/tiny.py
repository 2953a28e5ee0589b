"""Tiny random models, breakers and engines: thousands of requests in seconds, in float32.

The oracle is transformers' forward of the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from circuit_breakers.artifact import Breaker, ProbeWeights, save_breaker
from circuit_breakers.artifact.manifest import Aggregation, Canary, Message, ProbeSpec
from circuit_breakers.engine.launch import EngineSettings, engine_arguments
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.models import ResolvedModel, resolve_model

from .conftest import CALIBRATION, write_adapter

VOCAB = 320
WIDTH = 128
NUM_LAYERS = 6
MAX_LEN = 256
WINDOW = 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOLERANCE = 1e-3
"""Absolute, on logits of standard deviation 1 to 3; worst difference seen: 1e-4."""

FloatArray = npt.NDArray[np.float32]


def write_llama(out: Path) -> ResolvedModel:
    """Six blocks, full attention."""
    config = LlamaConfig(
        **_SIZES,
    )
    torch.manual_seed(0)
    return _save(Llama(config), out)


def write_gemma3(out: Path) -> ResolvedModel:
    """Six blocks, two of three with a sliding window: a hybrid KV cache."""
    config = Gemma3TextConfig(
        **_SIZES,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    return _save(Gemma3ForCausalLM(config), out)


def _save(model: Any, out: Path) -> ResolvedModel:
    model.to(torch.float32).save_pretrained(out)
    # Only has to be there: the tests speak in token ids.
    (out / "tokenizer.json").write_text("{}")
    (out / "tokenizer_config.json").write_text("{}")
    return resolve_model(str(out))


def write_tiny_breaker(
    out: Path,
    model: ResolvedModel,
    layers: Sequence[tuple[int, ...]] = ((1,), (1, 4), (4,)),
) -> Breaker:
    """One random probe for each set of layers, thresholds out of reach."""
    rng = np.random.default_rng(3)
    specs, weights = [], {}
    for i, read in enumerate(layers):
        alone = len(read) == 1
        aggregation = Aggregation(kind="max") if i % 2 == 0 else Aggregation(kind="ema", alpha=0.4)
        specs.append(
            ProbeSpec(
                name=f"probe{i}",
                layer=read[0] if alone else None,
                layers=None if alone else read,
                aggregation=aggregation,
                threshold_logit=1e9,
                calibration=CALIBRATION,
            )
        )
        shape = (model.hidden_size,) if alone else (len(read), model.hidden_size)
        weight_D = rng.normal(0, 1, shape).astype(np.float32)
        weights[f"probe{i}"] = ProbeWeights(weight_D / 10, 0.5 * i)
    adapter = write_adapter(out.parent / f"{out.name}-adapter", model, 0.05)
    return save_breaker(
        out,
        name="tiny",
        base_model=model.spec(),
        recipe={},
        data_sha256={},
        probes=specs,
        weights=weights,
        adapter_dir=adapter,
        canaries=(
            Canary(messages=(Message(role="user", content="harm"),), label="harmful"),
            Canary(messages=(Message(role="user", content="hello"),), label="benign"),
        ),
        extra_files={},
    )


def tiny_engine(model: ResolvedModel, breaker: Breaker, **changes: Any) -> Any:
    """An in-process vllm.LLM: 8 requests at once, 48 tokens a step, blocks of 32 tokens.

    The KV cache has 18 blocks, so that requests are preempted and cached blocks evicted.
    """
    from vllm import LLM

    settings = EngineSettings(
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        served_name="tiny",
    )
    arguments = engine_arguments(settings, model, breaker) | {
        "skip_tokenizer_init": True,
        "block_size": 32,
        "num_gpu_blocks_override": 18,
        "scheduling_policy": "priority",
        "disable_log_stats": True,
    }
    return LLM(**arguments | changes)


class Oracle:
    """Logits by transformers, one sequence at a time, all positions afresh."""

    def __init__(self, model: ResolvedModel, breaker: Breaker) -> None:
        self._breaker = breaker
        self._model = AutoModelForCausalLM.from_pretrained(
            merged_checkpoint(model, breaker), dtype=torch.float32, local_files_only=True
        ).eval()

    def __call__(self, token_ids: Sequence[int]) -> FloatArray:
        """float32 (T, P)."""
        with torch.no_grad():
            hidden = self._model(
                torch.tensor([list(token_ids)]), output_hidden_states=True
            ).hidden_states
        columns = []
        for spec in self._breaker.manifest.probes:
            weights = self._breaker.weights[spec.name]
            # The last entry of hidden_states is normalised, which no probe layer here reads.
            parts = [
                hidden[layer + 1][0].numpy() @ weight_D
                for layer, weight_D in zip(spec.read_layers, weights.weight_LD, strict=True)
            ]
            columns.append(sum(parts) + weights.bias)
        return np.stack(columns, axis=1)


class Rig:
    """One engine with all that it takes to check it."""

    def __init__(self, llm: Any, oracle: Oracle) -> None:
        self.llm = llm
        self.oracle = oracle
        self.recorder = CoreRecorder(core_of(llm).scheduler)


class Delivery(NamedTuple):
    """One EngineCoreOutput as it left the engine core."""

    token_ids: tuple[int, ...]
    start: int
    logit_TP: FloatArray
    tripped: bool
    finished: bool
    stopped: bool
    num_logprobs: int


class CoreRecorder:
    """Everything that leaves an engine core, by request."""

    def __init__(self, scheduler: Any) -> None:
        self.prompts: dict[str, list[int]] = {}
        self.deliveries: dict[str, list[Delivery]] = {}
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        add_request, update = scheduler.add_request, scheduler.update_from_output

        def recorded_add(request: Any) -> None:
            self.prompts[request.request_id] = list(request.prompt_token_ids)
            self.deliveries[request.request_id] = []
            add_request(request)

        def recorded_update(scheduler_output: Any, runner_output: Any) -> Any:
            self.num_preemptions += len(scheduler_output.preempted_req_ids or ())
            for new in scheduler_output.scheduled_new_reqs:
                self.num_cached_tokens += new.num_computed_tokens
            outputs = update(scheduler_output, runner_output)
            for engine_outputs in outputs.values():
                for output in engine_outputs.outputs:
                    self.deliveries[output.request_id].append(_delivery(output))
            return outputs

        scheduler.add_request = recorded_add
        scheduler.update_from_output = recorded_update

    def tokens(self, request_id: str) -> list[int]:
        return [t for d in self.deliveries[request_id] for t in d.token_ids]

    def check_order(self, request_id: str) -> FloatArray:
        """Scores came once each, in order, none later than its token; all of them, (T, P)."""
        num_scores, num_tokens = 0, len(self.prompts[request_id])
        for delivery in self.deliveries[request_id]:
            assert delivery.start == num_scores, "each score exactly once, in order"
            num_scores += len(delivery.logit_TP)
            num_tokens += len(delivery.token_ids)
            if delivery.token_ids:
                assert num_tokens <= num_scores, "a token left before its score"
            assert delivery.num_logprobs <= len(delivery.token_ids)
        parts = [d.logit_TP for d in self.deliveries[request_id]]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def clear(self) -> None:
        self.prompts.clear()
        self.deliveries.clear()


def _delivery(output: Any) -> Delivery:
    start, num_probes, raw, trip = output.kv_transfer_params["circuit_breakers"]
    logprobs = output.new_logprobs
    return Delivery(
        token_ids=tuple(output.new_token_ids),
        start=start,
        logit_TP=np.frombuffer(raw, np.float32).reshape(-1, num_probes),
        tripped=trip is not None,
        finished=output.finish_reason is not None,
        stopped=str(output.finish_reason) == "stop",
        num_logprobs=0 if logprobs is None else len(logprobs.logprobs),
    )


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core
