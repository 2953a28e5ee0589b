"""Fixtures of general use: the offline environment and the real built-in model."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, torch or vllm, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Read once by OpenMP when torch loads; the in-process engine crawls with more threads than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from circuit_breakers.models import ResolvedModel, resolve_model


@pytest.fixture(scope="session")
def smollm2() -> ResolvedModel:
    """SmolLM2-135M-Instruct, converted once into the user's model cache and shared by all runs."""
    return resolve_model("smollm2-135m-instruct")
