"""A request may tighten the policy that it runs under, never loosen it.

Looser is whatever lets one token more through than the caller's own policy would: a higher
threshold, observe where it enforces, a probe or a phase left out, text shown where it is withheld.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from circuit_breakers.artifact.manifest import Manifest
from circuit_breakers.errors import CalibrationError, PolicyRequestError
from circuit_breakers.guard.decision import Mode
from circuit_breakers.policies.policy_file import Share, Threshold, TripAction
from circuit_breakers.policies.served_policy import ServedPolicy, at_target_fpr, at_threshold

__all__ = ["GuardRequest", "loosenings", "parse_guard_request", "tighten"]

_WITHHOLDS: tuple[TripAction, ...] = ("stop", "refuse", "error")
"""By what they withhold of a text, least first: some streams have no place for a refusal, and show
what is on its way at the trip."""

PolicyName = Annotated[str, Field(max_length=64)]


class GuardRequest(BaseModel):
    """The `guard` field of a request: what it wants stricter, and whether it wants scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyName | None = None
    """Name of a policy in the file, to start from instead of the caller's own."""
    mode: Mode | None = None
    target_fpr: Share | None = None
    threshold: Threshold | dict[PolicyName, Threshold] | None = None
    token_scores: StrictBool = False
    """The score of each token in the answer, for an admin."""


def parse_guard_request(value: Any) -> GuardRequest:
    """The field as it was sent.

    Raises:
        PolicyRequestError: naming what does not fit.
    """
    try:
        asked = GuardRequest.model_validate(value)
    except ValidationError as e:
        problem = e.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, ("guard", *problem["loc"][:1])))
        raise PolicyRequestError(
            f"{place}: {problem['msg'].lower()}; expected an object with policy (a name), mode "
            "(enforce), target_fpr (a share between 0 and 1) or threshold (a logit), and "
            "token_scores (true or false)"
        ) from e
    if asked.target_fpr is not None and asked.threshold is not None:
        raise PolicyRequestError("guard: got target_fpr and threshold, expected one; remove one")
    return asked


def tighten(
    own: ServedPolicy,
    asked: GuardRequest,
    named: Mapping[str, ServedPolicy],
    manifest: Manifest,
) -> ServedPolicy:
    """The policy that a request asks for, at least as strict as `own` in every respect.

    Raises:
        PolicyRequestError: it would loosen something, saying what, or is not there.
    """
    start = own
    if asked.policy is not None and asked.policy != own.name:
        if asked.policy not in named:
            raise PolicyRequestError(
                f"got policy {asked.policy!r}, which the server does not have; leave it out, or "
                "ask the operator for the names"
            )
        start = named[asked.policy]
    if asked.mode is not None:
        start = replace(start, policy=replace(start.policy, mode=asked.mode))
    if asked.target_fpr is not None:
        try:
            start = at_target_fpr(start, asked.target_fpr, manifest)
        except CalibrationError as e:
            raise PolicyRequestError(str(e)) from e
    if asked.threshold is not None:
        start = _at_own_threshold(start, asked.threshold)
    if looser := loosenings(own, start):
        raise PolicyRequestError(
            f"a request may tighten its policy {own.name!r}, never loosen it: {'; '.join(looser)}; "
            "ask for something at least as strict, or leave it out"
        )
    return start


def loosenings(own: ServedPolicy, asked: ServedPolicy) -> list[str]:
    """Every respect in which `asked` is looser than `own`."""
    mine, other = own.policy, asked.policy
    found = []
    if mine.mode == "enforce" and other.mode != "enforce":
        found.append(f"mode {other.mode} would stop nothing, yours is enforce")
    found += [f"phase {phase} would not be judged" for phase in sorted(mine.phases - other.phases)]
    for k, probe in enumerate(mine.probes):
        if not mine.judges_K[k]:
            continue
        if not other.judges_K[k]:
            found.append(f"probe {probe.name} would not be judged")
        elif other.probes[k].threshold_logit > probe.threshold_logit:
            found.append(
                f"threshold {other.probes[k].threshold_logit:g} of probe {probe.name} is above "
                f"yours, {probe.threshold_logit:g}"
            )
        # With the prompt in it, a mean over tokens may stay below that of the completion alone.
        if (
            probe.aggregation.kind != "max"
            and "prompt" in other.phases
            and "prompt" not in mine.phases
        ):
            found.append(f"the prompt would thin out the mean of probe {probe.name}")
    if _WITHHOLDS.index(asked.action) < _WITHHOLDS.index(own.action):
        found.append(
            f"action {asked.action} would show the text up to a trip, yours is {own.action}"
        )
    return found


def _at_own_threshold(start: ServedPolicy, asked: float | dict[str, float]) -> ServedPolicy:
    judged = {
        probe.name
        for probe, judges in zip(start.policy.probes, start.policy.judges_K, strict=True)
        if judges
    }
    if isinstance(asked, dict) and (unknown := sorted(asked.keys() - judged)):
        # It could not take effect.
        raise PolicyRequestError(
            f"guard.threshold: got probe {unknown[0]!r}, expected one that is judged: "
            f"{', '.join(sorted(judged))}; correct its name"
        )
    return at_threshold(start, asked)
