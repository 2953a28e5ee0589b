"""Engine modes that vLLM runs on GPUs, made to run on a CPU. Only the platform's choice and device
plumbing are touched, never model, scheduler or sampling.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

RUNNER_V2 = os.environ.get("CIRCUIT_BREAKERS_TEST_RUNNER_V2") == "1"
"""Run every in-process engine on model runner V2, through Triton's interpreter (needs triton)."""


def use_runner_v2() -> None:
    """Before anything imports vllm."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("CIRCUIT_BREAKERS_TEST_RUNNER_V2=1 needs `pip install triton`")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        compiler = None
        driver = Driver

    # vLLM looks for a driver; the interpreter never asks for one.
    backends.setdefault("cpu", Backend())


@contextmanager
def async_scheduling_on_cpu() -> Iterator[None]:
    """Engines made inside keep async scheduling, which the CPU platform switches off."""
    from vllm.platforms.cpu import CpuPlatform

    original: Any = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with mock.patch.object(CpuPlatform, "check_and_update_config", classmethod(keep)):
        yield
