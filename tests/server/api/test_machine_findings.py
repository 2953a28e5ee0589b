"""What the state machine has found, in the fewest steps."""

from __future__ import annotations

from .policy_model import Rule
from .test_policy_machine import Machine


def test_a_request_that_an_unscored_token_ends_did_not_end_on_its_observed_prompt() -> None:
    machine = Machine()
    try:
        machine.reload(
            by_signal=False,
            one=Rule(name="-", threshold=1.0, mode="enforce", action="stop"),
            rotates=False,
            two=Rule(name="-", threshold=1.0, mode="observe", action="error"),
        )
        machine.chat(
            fault=None,
            guard=None,
            holds=False,
            key_number=1,
            prompt=2.0,
            scores=[None],
            streams=False,
        )
        machine.metrics_are_the_models()
    finally:
        machine.teardown()
