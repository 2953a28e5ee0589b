"""One screen for all policies that run at once."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from circuit_breakers.engine.request_policy import own_args
from circuit_breakers.engine.running_streams import RunningStreams

from .test_request_policy import DEFAULT

LOOSE = dataclasses.replace(
    DEFAULT, probes=tuple(p.model_copy(update={"threshold_logit": 9.0}) for p in DEFAULT.probes)
)
ROW = np.array([[5.0, 0.0, 0.0]], np.float32)
"""Over DEFAULT's threshold of 0, under LOOSE's of 9."""


def request(request_id: str, policy: Any = None) -> Any:
    return SimpleNamespace(
        request_id=request_id,
        num_prompt_tokens=2,
        sampling_params=SimpleNamespace(extra_args=own_args(policy) if policy else None),
    )


def test_the_screen_is_as_strict_as_the_strictest_stream_that_runs() -> None:
    streams = RunningStreams()
    assert streams.screen is None
    for name in "ab":
        streams.open(request(name, LOOSE), DEFAULT)
    assert streams.screen is not None and streams.screen.is_harmless(ROW)
    strict = streams.open(request("c"), DEFAULT)
    assert strict.policy is DEFAULT
    assert not streams.screen.is_harmless(ROW)
    streams.close("a")
    assert not streams.screen.is_harmless(ROW)
    streams.close("c")
    assert streams.screen.is_harmless(ROW), "the strict one is gone"
    streams.close("b")
    assert streams.screen is None
    assert len(streams) == 0
    assert streams._num_by_screen == {}
