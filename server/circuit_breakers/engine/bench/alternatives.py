"""What people do instead of a guard inside the engine, each with an engine of its own.

hidden-states: vLLM's own extract_hidden_states writes the probed layers of every request to a file,
which is read back, as a probe outside of the engine would.

guard-model: a second model of the same size checks the prompt before, and prompt and completion
after; one token of output each, as moderation models answer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from circuit_breakers.artifact import Breaker
from circuit_breakers.engine.bench.blocks import BenchEngine, Block
from circuit_breakers.errors import NotReadyError

__all__ = ["Alternative", "GuardModel", "HiddenStates"]

_DRAIN_LIMIT_S = 60


class Alternative(Protocol):
    """Another way to guard the same requests."""

    def block(self, batch: int, prompt_tokens: int, output_tokens: int) -> Block:
        """One block, with all that it takes until the requests are checked."""
        ...

    def close(self) -> None: ...


class HiddenStates:
    """Hidden states of the probed layers, out of vLLM by its connector that writes files.

    Its time is a block's, the wait for the last file, and reading the files; no probe is run.
    """

    def __init__(
        self,
        start: Callable[[dict[str, Any]], BenchEngine],
        arguments: dict[str, Any],
        breaker: Breaker,
        directory: Path,
    ) -> None:
        """
        Args:
            start: an engine from arguments of vllm.LLM.
            arguments: of an engine on the checkpoint with the adapter inside.
            directory: where the files go.
        """
        # vLLM counts as transformers does: entry i is what block i reads.
        layers = sorted({i + 1 for probe in breaker.manifest.probes for i in probe.read_layers})
        hf_config = {"eagle_aux_hidden_state_layer_ids": layers}
        self._engine = start(
            arguments
            | {
                "speculative_config": {
                    "method": "extract_hidden_states",
                    "num_speculative_tokens": 1,
                    "draft_model_config": {"hf_config": hf_config},
                },
                "kv_transfer_config": {
                    "kv_connector": "ExampleHiddenStatesConnector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {"shared_storage_path": str(directory)},
                },
            }
        )

    def block(self, batch: int, prompt_tokens: int, output_tokens: int) -> Block:
        """One block.

        Raises:
            NotReadyError: files are missing.
        """
        from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
            cleanup_hidden_states,
            load_hidden_states,
        )

        engine = self._engine
        block = engine.run(
            engine.prompts(batch, prompt_tokens),
            output_tokens,
            extra_args={"kv_transfer_params": {"include_output_tokens": True}},
        )
        began_s = time.perf_counter()
        # A request's file is only begun by a step after its last.
        while engine.scheduler.has_requests():
            engine.llm.llm_engine.step()
            if time.perf_counter() - began_s > _DRAIN_LIMIT_S:
                raise NotReadyError(f"no hidden states {_DRAIN_LIMIT_S} s after the last token")
        for params in block.params:
            path = (params or {}).get("hidden_states_path")
            if path is None:
                raise NotReadyError("a request ended without the path of its hidden states")
            load_hidden_states(path)
            cleanup_hidden_states(path)
        return _without_steps(block, block.elapsed_s + time.perf_counter() - began_s)

    def close(self) -> None:
        self._engine.close()


class GuardModel:
    """The base model as a moderation model, next to a plain engine in the same process."""

    def __init__(
        self,
        start: Callable[[dict[str, Any]], BenchEngine],
        arguments: dict[str, Any],
        plain: BenchEngine,
        take_guard_out: Callable[[], None],
    ) -> None:
        """
        Args:
            start: an engine from arguments of vllm.LLM.
            arguments: of an engine on the base model.
            plain: the engine that answers.
            take_guard_out: of that engine; the next block puts it in again if it needs it.
        """
        self._plain = plain
        self._take_guard_out = take_guard_out
        self._engine = start(arguments)

    def block(self, batch: int, prompt_tokens: int, output_tokens: int) -> Block:
        """One block: prompts checked, answered, prompts and completions checked."""
        self._take_guard_out()
        prompts = self._plain.prompts(batch, prompt_tokens)
        before = self._engine.run(prompts, 1)
        answered = self._plain.run(prompts, output_tokens)
        texts = [p + ids for p, ids in zip(prompts, answered.token_ids, strict=True)]
        after = self._engine.run(texts, 1)
        elapsed_s = before.elapsed_s + answered.elapsed_s + after.elapsed_s
        return _without_steps(answered, elapsed_s)

    def close(self) -> None:
        self._engine.close()


def _without_steps(block: Block, elapsed_s: float) -> Block:
    """Steps of two engines, or with drafts in them, cannot be matched with plain ones."""
    return dataclasses.replace(block, elapsed_s=elapsed_s, steps=[], ttft_s=[], itl_s=[])
