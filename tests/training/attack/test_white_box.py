"""Losses, scores and answers of the white box beside plain transformers and the serving guard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuit_breakers.artifact import (
    Aggregation,
    Breaker,
    Calibration,
    ProbeSpec,
    ProbeWeights,
    load_breaker,
)
from circuit_breakers.guard.aggregation import aggregate
from circuit_breakers.guard.policy import Policy
from circuit_breakers_training.attack.white_box import WhiteBox, probe_penalty, running_scores
from circuit_breakers_training.evaluation.guarded import guard_stream

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = (2, 5, 36, 41, 50, 4, 3)
ANSWER = (40, 41, 42, 60, 61)
STOP = 4
AGGREGATIONS = [
    Aggregation(kind="max"),
    Aggregation(kind="max", skip_tokens=3),
    Aggregation(kind="rolling_mean", window=4),
    Aggregation(kind="rolling_mean", window=64, skip_tokens=2),
    Aggregation(kind="ema", alpha=0.3),
    Aggregation(kind="ema", alpha=1.0, skip_tokens=2),
]


class Plain(NamedTuple):
    """What transformers says of a stream of tokens."""

    logit_T: np.ndarray
    """Of the probe."""
    logit_TV: torch.Tensor


@pytest.fixture(scope="module")
def breaker(breaker_dir: Path) -> Breaker:
    return load_breaker(breaker_dir)


@pytest.fixture(scope="module")
def white_box(roomy_llama: Path, breaker: Breaker) -> WhiteBox:
    return WhiteBox(roomy_llama, breaker)


def _plain(model_dir: Path, breaker: Breaker, ids: tuple[int, ...]) -> Plain:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    (probe,) = breaker.manifest.probes
    weight_D, bias = breaker.weights[probe.name]
    return Plain(
        out.hidden_states[probe.layer + 1][0].numpy() @ weight_D + np.float32(bias), out.logits[0]
    )


def _policy(breaker: Breaker, threshold: float, kind: Aggregation = AGGREGATIONS[0]) -> Policy:
    (probe,) = breaker.manifest.probes
    update = {"threshold_logit": threshold, "aggregation": kind}
    return Policy(breaker="b", probes=(probe.model_copy(update=update),), mode="enforce")


@pytest.mark.parametrize("spec", AGGREGATIONS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 20])
def test_running_scores_are_those_of_serving(spec: Aggregation, num_tokens: int) -> None:
    logit_T = np.random.default_rng(num_tokens).normal(0, 4, num_tokens).astype(np.float32)
    expected_S = aggregate(logit_T, spec)[spec.skip_tokens :]
    score_S = running_scores(torch.from_numpy(logit_T), spec).numpy()
    np.testing.assert_allclose(score_S, expected_S, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", AGGREGATIONS, ids=str)
def test_the_loss_is_that_of_a_plain_implementation(
    white_box: WhiteBox, breaker: Breaker, roomy_llama: Path, spec: Aggregation
) -> None:
    plain = _plain(roomy_llama, breaker, PROMPT + ANSWER)
    score_S = aggregate(plain.logit_T, spec)[spec.skip_tokens :]
    threshold, margin = float(np.median(score_S)), 0.5
    log_probs_TV = plain.logit_TV.log_softmax(-1)
    at = len(PROMPT) - 1
    expected_nats = -np.mean([float(log_probs_TV[at + i, t]) for i, t in enumerate(ANSWER)])
    too_high = [s - threshold + margin for s in score_S.tolist() if s - threshold + margin > 0]
    assert too_high
    loss = white_box.loss(
        white_box.embed(PROMPT), ANSWER, _policy(breaker, threshold, spec), margin=margin
    )
    assert loss.answer.item() == pytest.approx(expected_nats, rel=1e-4)
    assert loss.penalty.item() == pytest.approx(np.mean(too_high), rel=1e-3)
    without = white_box.loss(white_box.embed(PROMPT), ANSWER, None, margin=margin)
    assert (without.answer.item(), without.penalty.item()) == (loss.answer.item(), 0.0)


def test_scores_below_the_margin_cost_nothing_and_pull_nowhere() -> None:
    policy = Policy(
        breaker="b",
        probes=(_any_probe("a", 5.0), _any_probe("b", 3.0)),
        mode="enforce",
    )
    # Position 0 is not judged. The second probe's scores are 0, 2.5, 2.5.
    logit_TK = torch.tensor([[9.0, 9.0], [1.0, 0.0], [2.0, 2.5], [0.0, 1.0]], requires_grad=True)
    penalty = probe_penalty(logit_TK, policy, 1.0)
    # Two scores of 2.5 are 0.5 above 3 - 1; all else is below its mark.
    assert penalty.item() == pytest.approx(0.5)
    penalty.backward()
    assert logit_TK.grad is not None
    # Both scores are the logit of position 2.
    assert logit_TK.grad.nonzero().tolist() == [[2, 1]]
    logit_TK.grad = None
    assert probe_penalty(logit_TK, policy, 0.4).item() == 0.0


def _any_probe(name: str, threshold: float) -> ProbeSpec:
    return ProbeSpec(
        name=name,
        layer=0,
        aggregation=Aggregation(kind="max"),
        threshold_logit=threshold,
        calibration=Calibration(
            target_fpr=0.01,
            num_conversations=300,
            num_trips=0,
            fpr_upper_bound=0.00994,
            max_tokens=64,
        ),
    )


@pytest.mark.parametrize("spec", AGGREGATIONS[::2], ids=str)
def test_the_penalty_alone_pushes_scores_under_the_threshold(
    white_box: WhiteBox, breaker: Breaker, roomy_llama: Path, spec: Aggregation
) -> None:
    start = (7, 8, 9)
    plain = _plain(roomy_llama, breaker, (*PROMPT[:1], *start, *PROMPT[1:], *ANSWER))
    peak = float(aggregate(plain.logit_T, spec).max())
    policy = _policy(breaker, peak - 0.5, spec)
    soft_PD = white_box.embed(start).clone().requires_grad_()
    optimizer = torch.optim.Adam([soft_PD], lr=0.05)

    def penalty() -> torch.Tensor:
        prompt_TD = torch.cat([white_box.embed(PROMPT[:1]), soft_PD, white_box.embed(PROMPT[1:])])
        return white_box.loss(prompt_TD, ANSWER, policy, margin=0.1).penalty

    assert penalty().item() > 0
    for _ in range(300):
        value = penalty()
        if value.item() == 0:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert penalty().item() == 0


def test_an_answer_is_the_greedy_continuation_scored_as_serving_scores(
    white_box: WhiteBox, breaker: Breaker, roomy_llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(roomy_llama, dtype=torch.float32).eval()
    ids = list(PROMPT)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    written = tuple(ids[len(PROMPT) :])
    assert STOP not in written
    prompt_TD = white_box.embed(PROMPT)
    free = white_box.answer(prompt_TD, None, max_new_tokens=8, stop_id=STOP)
    assert free == (written, False, None)
    stopped = white_box.answer(prompt_TD, None, max_new_tokens=8, stop_id=written[3])
    assert stopped.ids == written[: written.index(written[3])]

    logit_T = _plain(roomy_llama, breaker, tuple(ids)).logit_T
    scores = aggregate(logit_T, AGGREGATIONS[0])
    # Thresholds at which each position is the first to trip, and one that nothing reaches.
    for threshold in (*sorted(set(scores[1:].tolist())), float(scores.max()) + 1):
        policy = _policy(breaker, threshold - 1e-3)
        seen = guard_stream(policy, logit_T[:, None], len(PROMPT))
        answer = white_box.answer(prompt_TD, policy, max_new_tokens=8, stop_id=STOP)
        assert answer.tripped == (seen.trip is not None)
        assert answer.ids == written[: seen.num_delivered]
        expected = float(scores.max()) if seen.trip is None else seen.trip.score
        assert answer.score == pytest.approx(expected, abs=1e-3)


def test_a_model_of_several_probes_and_layers_is_read_at_each(
    roomy_llama: Path, breaker: Breaker
) -> None:
    (probe,) = breaker.manifest.probes
    width = breaker.manifest.base_model.hidden_size
    rng = np.random.default_rng(0)
    weights = {
        "two": rng.normal(0, 0.1, (2, width)).astype(np.float32),
        "one": rng.normal(0, 0.1, width).astype(np.float32),
    }
    specs = (
        probe.model_copy(update={"name": "two", "layer": None, "layers": (0, 2)}),
        probe.model_copy(update={"name": "one", "layer": 1}),
    )
    several = replace(
        breaker,
        manifest=breaker.manifest.model_copy(update={"probes": specs}),
        weights={name: ProbeWeights(weight, 0.25) for name, weight in weights.items()},
    )
    model = AutoModelForCausalLM.from_pretrained(roomy_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    h = [state[0].numpy() for state in states]
    expected = {
        "two": h[1] @ weights["two"][0] + h[3] @ weights["two"][1] + 0.25,
        "one": h[2] @ weights["one"] + 0.25,
    }
    box = WhiteBox(roomy_llama, several)
    # Nothing is written after the prompt, so that the peak is over its tokens alone.
    (first_id,) = box.answer(box.embed(PROMPT), None, max_new_tokens=1, stop_id=-1).ids
    out_of_reach = tuple(spec.model_copy(update={"threshold_logit": 1e6}) for spec in specs)
    for spec in out_of_reach:
        policy = Policy(
            breaker="b", probes=out_of_reach, mode="enforce", judged=frozenset({spec.name})
        )
        answer = box.answer(box.embed(PROMPT), policy, max_new_tokens=1, stop_id=first_id)
        peak = aggregate(expected[spec.name].astype(np.float32), spec.aggregation).max()
        assert answer.score == pytest.approx(float(peak), abs=1e-3)
