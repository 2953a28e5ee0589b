"""Takes the guard out of a live engine, puts it back, or puts one with other probes in its place.

Plain is what vLLM would be without us: no hooks on the model, the runner's own steps, no guard in
the scheduler, and vLLM's own output processor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from circuit_breakers.artifact import Breaker, ProbeSpec, ProbeWeights, save_breaker
from circuit_breakers.engine import probes as probes_module
from circuit_breakers.engine.bench.blocks import BenchEngine, Block
from circuit_breakers.engine.probes import WorkerProbes
from circuit_breakers.errors import NotReadyError
from circuit_breakers.guard.decision import Mode
from circuit_breakers.guard.policy import Policy

__all__ = ["PLAIN", "GuardState", "GuardSwitch", "Run", "breaker_with_probes", "switched"]

Run = Callable[[int, int, int], Block]
"""Batch, prompt tokens, output tokens -> a block."""

_OUT_OF_REACH_LOGIT = 1e9
_MAX_PROBES = 16


class GuardState(NamedTuple):
    """What the guard of a live engine is to be."""

    mode: Mode | None
    """None takes the guard out."""
    num_probes: int | None = None
    """None takes the breaker's own."""


PLAIN = GuardState(None)


class GuardSwitch:
    """Switches one engine. Thresholds are out of reach, so that no block is cut short."""

    def __init__(self, llm: Any, *others: Breaker, compiled: bool = False) -> None:
        """Prepares the guard that the engine runs, and those of `others`, by number of probes.

        A compiled graph keeps the probes that it was compiled with: there, `others` must be empty,
        and the op stays in the graph of the plain arm, where it returns at once.
        """
        assert not (compiled and others), "a compiled graph keeps its probes"
        from vllm.v1.engine import output_processor

        self.runner: Any = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.guard = self.scheduler._circuit_breakers
        self.probes: WorkerProbes = self.runner._circuit_breakers
        self._compiled = compiled
        self._policy: Policy = self.guard.policy
        self._policies: dict[int | None, Policy] = {None: self._policy}
        self._variables: dict[int | None, dict[str, Any]] = {}
        if not compiled:
            self._variables[None] = _taken_off(self.probes)
        num_rows = len(self.probes._part_NC)
        for other in others:
            number = len(other.manifest.probes)
            policy = Policy.from_manifest(other.manifest, "enforce")
            probes = WorkerProbes(other, self.runner.get_model(), num_rows, self.runner.device)
            self._policies[number], self._variables[number] = policy, _taken_off(probes)
        # Each of these wraps what vLLM had there.
        self._wraps = [
            (owner, name, getattr(owner, name))
            for owner, name in (
                (self.runner, "execute_model"),
                (self.runner, "sample_tokens"),
                (output_processor.OutputProcessor, "process_outputs"),
                (output_processor.RequestState, "_new_completion_output"),
            )
        ]
        self.set(GuardState("enforce"))

    def set(self, state: GuardState) -> None:
        """Makes the engine run under `state` from the next request on."""
        guarded = state.mode is not None
        if self._compiled:
            # Compiled code looks its hooks up by position; they must not be taken off.
            probes_module._disabled = not guarded
        else:
            self.probes.enable(False)
        for owner, name, wrap in self._wraps:
            setattr(owner, name, wrap if guarded else wrap.__wrapped__)
        self.scheduler._circuit_breakers = self.guard if guarded else None
        # Scores of other probes are no scores of these.
        self.guard.block_scores.clear()
        if state.mode is not None:
            if not self._compiled:
                # The runner's wraps hold on to this one object, so its content is exchanged.
                vars(self.probes).update(self._variables[state.num_probes])
                self.probes.enable(True)
            policy = self._policies[state.num_probes]
            self.guard.policy = dataclasses.replace(
                policy,
                mode=state.mode,
                probes=tuple(
                    p.model_copy(update={"threshold_logit": _OUT_OF_REACH_LOGIT})
                    for p in policy.probes
                ),
            )

    def restore(self) -> None:
        """Leaves the engine as it was found."""
        self.set(GuardState("enforce"))
        self.guard.policy = self._policy


def _taken_off(probes: WorkerProbes) -> dict[str, Any]:
    """What is in `probes`, without its hooks on the model."""
    probes.enable(False)
    return dict(vars(probes))


def switched(
    engine: BenchEngine, switch: GuardSwitch, state: GuardState, lora_request: Any = None
) -> Run:
    """Runs blocks of an engine under one state of its guard, and checks that it was in force."""

    def run(batch: int, prompt_tokens: int, output_tokens: int) -> Block:
        switch.set(state)
        prompts = engine.prompts(batch, prompt_tokens)
        block = engine.run(prompts, output_tokens, lora_request=lora_request)
        expected = None if state.mode is None else batch * (prompt_tokens + output_tokens)
        if block.num_scored != expected:
            raise NotReadyError(
                f"a block came with {block.num_scored} scores, expected {expected}; "
                "the guard of the engine was not switched"
            )
        return block

    return run


def breaker_with_probes(
    out: Path, breaker: Breaker, num_probes: int, num_layers: int = _MAX_PROBES
) -> Breaker:
    """A breaker in directory `out` with the adapter of `breaker` and `num_probes` probes.

    The first ones are the breaker's own. The others are random, of the norm of the first, and take
    `num_layers` layers in turn, the first one's among them. Each layer costs a call of the op, so
    the dearest way is a layer for each probe. Their thresholds are out of reach.
    """
    assert 1 <= num_probes <= _MAX_PROBES, "the manifest allows no other number"
    manifest = breaker.manifest
    # Without curves: the others would have to have the same.
    own = [_without_curve(p) for p in manifest.probes[:num_probes]]
    weights = {p.name: breaker.weights[p.name] for p in own}
    norm = float(np.linalg.norm(weights[own[0].name].weight_D))
    rng = np.random.default_rng(0)
    # The last block has no raw stream to read.
    num_readable = manifest.base_model.num_layers - 1
    layers = [own[0].read_layers[0]]
    layers += [layer for i in range(num_readable) if (layer := i * 5 % num_readable) != layers[0]]
    layers = list(dict.fromkeys(layers))[:num_layers]
    synthetic = []
    for i in range(num_probes - len(own)):
        direction_D = rng.normal(0, 1, manifest.base_model.hidden_size)
        weight_D = direction_D * (norm / math.sqrt(float(direction_D @ direction_D)))
        update = {
            "name": f"synthetic{i}",
            "layer": layers[(i + len(own)) % len(layers)],
            "layers": None,
            "threshold_logit": _OUT_OF_REACH_LOGIT,
        }
        synthetic.append(own[0].model_copy(update=update))
        weights[f"synthetic{i}"] = ProbeWeights(weight_D.astype(np.float32), 0.0)
    return save_breaker(
        out,
        name=manifest.name,
        base_model=manifest.base_model,
        recipe=manifest.recipe,
        data_sha256=manifest.data_sha256,
        probes=(*own, *synthetic),
        weights=weights,
        adapter_dir=breaker.adapter_dir,
        canaries=manifest.canaries,
        extra_files={},
    )


def _without_curve(probe: ProbeSpec) -> ProbeSpec:
    calibration = probe.calibration.model_copy(update={"curve": ()})
    return probe.model_copy(update={"calibration": calibration})
