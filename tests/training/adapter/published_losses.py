"""The losses of the published step, which ours are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from circuit_breakers_training.render import Rendered

__all__ = ["published_losses"]


def published_losses(
    model: Any, retain: list[Rendered], harmful: list[Rendered], layers: list[int]
) -> tuple[Tensor, Tensor]:
    """The published step: four forward passes of the whole model, hidden_states[layer + 1].

    Written from Algorithm 1 of arXiv 2406.04313, one conversation at a time, without padding.
    """

    def states(row: Rendered) -> Tensor:
        ids = torch.tensor([row.ids])
        out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return torch.stack([out.hidden_states[layer + 1][0] for layer in layers])

    errors, cosines = [], []
    for row in retain:
        with torch.no_grad(), model.disable_adapter():
            base = states(row)
        errors.append((states(row) - base).norm(dim=-1, p=2))
    for row in harmful:
        with torch.no_grad(), model.disable_adapter():
            base = states(row)[:, row.num_prompt_tokens :]
        adapted = states(row)[:, row.num_prompt_tokens :]
        cosines.append(cosine_similarity(adapted, base, dim=-1).relu())
    return torch.cat(errors, dim=1).mean(), torch.cat(cosines, dim=1).mean()
