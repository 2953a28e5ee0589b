"""What transformers says of the tokens that a client got, without asking the guard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from circuit_breakers.artifact import load_breaker
from circuit_breakers.models import ResolvedModel

from .breaker_for_words import FloatArray

__all__ = ["MARGIN", "Oracle", "word_oracle"]

MARGIN = 1.5
"""bfloat16 in other batches moves a logit by up to 0.5; the word is at 5 and more, others at -5."""

Oracle = Callable[[list[int]], FloatArray]
"""Largest probe logit of each token of a text."""


def word_oracle(model: ResolvedModel, breaker_dir: Path) -> Oracle:
    """For the breaker for words, whose adapter is one of zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    breaker = load_breaker(breaker_dir)
    lm = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, local_files_only=True
    ).eval()

    def peaks(token_ids: list[int]) -> FloatArray:
        with torch.no_grad():
            hidden = lm.base_model(torch.tensor([token_ids]), output_hidden_states=True)
        columns = []
        for spec in breaker.manifest.probes:
            weight_D, bias = breaker.weights[spec.name]
            columns.append(hidden.hidden_states[spec.layer + 1][0].numpy() @ weight_D + bias)
        peak_T: FloatArray = np.stack(columns, axis=1).max(axis=1)
        return peak_T

    return peaks
