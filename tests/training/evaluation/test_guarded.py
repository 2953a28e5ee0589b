"""Trips and delivered tokens, on logits written by hand and on the tiny breaker."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from circuit_breakers.artifact import Aggregation, Calibration, ProbeSpec, load_breaker
from circuit_breakers.engine.merge import merged_checkpoint
from circuit_breakers.errors import EvaluationError
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers.guard.policy import Policy
from circuit_breakers.models import resolve_model
from circuit_breakers_training.evaluation.completions import Completion
from circuit_breakers_training.evaluation.guarded import guard_completions, guard_stream
from circuit_breakers_training.render import Rendered

CALIBRATION = Calibration(
    target_fpr=0.01, num_conversations=300, num_trips=0, fpr_upper_bound=0.00994, max_tokens=64
)


def _policy(*thresholds: float) -> Policy:
    probes = tuple(
        ProbeSpec(
            name=f"layer{k}",
            layer=k,
            aggregation=Aggregation(kind="max"),
            threshold_logit=threshold,
            calibration=CALIBRATION,
        )
        for k, threshold in enumerate(thresholds)
    )
    return Policy(breaker="b", probes=probes, mode="enforce")


def _logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_the_tripping_token_is_not_delivered() -> None:
    # Prompt of 3 tokens; position 0 is never judged.
    seen = guard_stream(_policy(2.0), _logits(9, 0, 0, 0, 0, 3, 0), 3)
    assert seen.trip is not None
    assert (seen.trip.phase, seen.trip.token_index) == ("completion", 5)
    assert seen.num_delivered == 2
    assert seen.stopped(3)
    assert not seen.stopped(2)


def test_a_trip_on_the_prompt_delivers_nothing() -> None:
    seen = guard_stream(_policy(2.0), _logits(0, 2, 0, 9), 3)
    assert seen.trip is not None
    assert seen.trip.phase == "prompt"
    assert seen.num_delivered == 0
    assert seen.stopped(1)


def test_a_quiet_stream_is_delivered_whole() -> None:
    seen = guard_stream(_policy(2.0), _logits(9, 0, 0, 1, 1), 3)
    assert (seen.trip, seen.num_delivered, seen.num_unscored) == (None, 2, 0)
    assert not seen.stopped(99)


def test_any_probe_may_trip_and_a_missing_score_does() -> None:
    logit_TK = np.zeros((5, 2), np.float32)
    logit_TK[3, 1] = 6
    seen = guard_stream(_policy(2.0, 5.0), logit_TK, 3)
    assert seen.trip is not None
    assert (seen.trip.probe, seen.num_delivered) == ("layer1", 0)
    seen = guard_stream(_policy(2.0), _logits(0, 0, 0, 0, np.nan), 3)
    assert seen.trip is not None
    assert (seen.num_delivered, seen.num_unscored) == (1, 1)


def test_a_checkpoint_without_scores_is_an_error(
    breaker_dir: Path, roomy_llama: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(roomy_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][20] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = [Rendered(ids=ids, num_prompt_tokens=2) for ids in ((5, 6, 7, 8), (5, 6, 20, 8))]
    completions = [Completion(row, "", False) for row in rows]
    with pytest.raises(EvaluationError, match="got 1 of 2 conversations"):
        guard_completions(load_breaker(breaker_dir), broken, completions)


@pytest.mark.usefixtures("own_cache")
def test_scores_are_those_of_the_merged_checkpoint(breaker_dir: Path, roomy_llama: Path) -> None:
    import torch

    breaker = load_breaker(breaker_dir)
    merged = merged_checkpoint(resolve_model(str(roomy_llama)), breaker)
    rows = [Rendered(ids=tuple(range(5, 5 + n)), num_prompt_tokens=4) for n in (6, 30, 11)]
    seen = guard_completions(breaker, merged, [Completion(row, "", False) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    (probe,) = breaker.manifest.probes
    weight_D, bias = breaker.weights[probe.name]
    for row, one in zip(rows, seen, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        logit_T = states[probe.layer + 1][0].numpy() @ weight_D + np.float32(bias)
        np.testing.assert_allclose(one.logit_TK[:, 0], logit_T, atol=1e-3)
        over = np.flatnonzero(aggregate(logit_T, probe.aggregation) >= probe.threshold_logit)
        assert (one.trip.token_index if one.trip else None) == (over[0] if len(over) else None)
