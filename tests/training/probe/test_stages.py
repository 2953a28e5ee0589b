"""What a calibrated probe says about its benign conversations."""

from __future__ import annotations

import numpy as np
import pytest

from circuit_breakers.artifact import Aggregation, ProbeWeights
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy
from circuit_breakers_training.data.jsonl import Conversation, Message
from circuit_breakers_training.probe.calibration import peak_histogram
from circuit_breakers_training.probe.evaluate import ScoredConversation
from circuit_breakers_training.probe.selection import Candidate
from circuit_breakers_training.probe.stages import calibrate_probe
from circuit_breakers_training.recipes.config import ProbeRecipe, Recipe


def _benign(count: int) -> list[ScoredConversation]:
    rng = np.random.default_rng(0)
    conversation = Conversation(
        messages=(Message("user", "q"), Message("assistant", "a")),
        label="benign",
        source="s",
        group="g",
    )
    return [
        ScoredConversation(
            conversation,
            int(rng.integers(2, 9)),
            rng.normal(size=int(rng.integers(9, 30))).astype(np.float32),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "aggregation",
    [
        Aggregation(kind="max"),
        Aggregation(kind="ema", alpha=0.3),
        Aggregation(kind="rolling_mean", window=4),
    ],
    ids=lambda a: a.kind,
)
def test_histogram_is_of_what_the_server_observes(aggregation: Aggregation) -> None:
    rows = _benign(80)
    probe = Candidate((1,), aggregation, ProbeWeights(np.zeros(4, np.float32), 0.0))
    spec = calibrate_probe(Recipe(model="m", probe=ProbeRecipe(target_fpr=0.05)), probe, rows)
    policy = Policy(breaker="b", mode="observe", probes=(spec,))
    observed = []
    for row in rows:
        stream = StreamBreaker(policy, row.num_prompt_tokens)
        # One token after the other, as they are generated.
        for logit in row.logit_T:
            stream.update(np.array([[logit]], np.float32))
        observed.append(stream.phase_peaks)
    assert spec.calibration.histogram == {
        phase: peak_histogram(np.array([peaks[phase] for peaks in observed], np.float32))
        for phase in ("prompt", "completion")
    }
