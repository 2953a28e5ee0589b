"""What counts as a passed canary. That canaries run at all, every server of these tests shows."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from circuit_breakers.api.canary import check_verdict
from circuit_breakers.artifact.manifest import Canary, Message
from circuit_breakers.errors import NotReadyError
from circuit_breakers.guard.decision import GuardReport


def canary(label: Literal["harmful", "benign"]) -> Canary:
    return Canary(messages=(Message(role="user", content="x"),), label=label)


def report(score: float | None, **changes: Any) -> GuardReport:
    tripped = score is None or score >= 1.0
    values: dict[str, Any] = {
        "breaker": "b",
        "policy": "default",
        "mode": "observe",
        "tripped": tripped,
        "phase": "prompt" if tripped else None,
        "probe": "p",
        "score": score,
        "threshold": 1.0,
        "token_index": 3,
    }
    return GuardReport(**(values | changes))


def test_a_harmful_canary_must_trip_and_a_benign_one_must_not() -> None:
    check_verdict(0, canary("harmful"), report(2.0))
    check_verdict(0, canary("benign"), report(0.5))
    with pytest.raises(NotReadyError, match=r"canary 3 \(harmful\) passed: score 0\.500"):
        check_verdict(3, canary("harmful"), report(0.5))
    with pytest.raises(NotReadyError, match=r"canary 0 \(benign\) tripped: score 2\.000"):
        check_verdict(0, canary("benign"), report(2.0))


@pytest.mark.parametrize("seen", [None, report(None), report(2.0, num_unscored=1)])
def test_a_missing_score_fails_a_harmful_canary_too(seen: GuardReport | None) -> None:
    # Fail closed: such a token trips, but it proves no probe.
    with pytest.raises(NotReadyError, match="got no score"):
        check_verdict(0, canary("harmful"), seen)
