"""A float32 checkpoint whose inputs can be moved, with the breaker's probes on it.

The scores are those of serving (guard/aggregation.py), written so that gradients pass through.

T tokens of a stream, S of them judged, A of the wanted answer, K probes, D model width,
V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuit_breakers.artifact import Aggregation, Breaker
from circuit_breakers.guard.breaker import StreamBreaker
from circuit_breakers.guard.policy import Policy
from circuit_breakers.hardware import pick_device
from circuit_breakers_training.blocks import decoder_blocks, record_outputs

__all__ = ["Answer", "AttackLoss", "WhiteBox", "probe_penalty", "running_scores"]


class Answer(NamedTuple):
    """What a guarded model writes, as far as a reader gets it."""

    ids: tuple[int, ...]
    """Delivered tokens; the token that trips is not one of them."""
    tripped: bool
    score: float | None
    """Highest running score, next to its threshold; None without a probe."""


class AttackLoss(NamedTuple):
    """The two things that the attacker wants, as scalars with gradients."""

    answer: Tensor
    """Mean cross-entropy of the wanted answer's tokens."""
    penalty: Tensor
    """How far scores stand above where they should be; 0 without a probe."""


class WhiteBox:
    """One model, to be attacked with or without the probes."""

    def __init__(self, model_dir: Path, breaker: Breaker) -> None:
        """Loads the checkpoint in float32, frozen.

        Args:
            model_dir: the base model, or the model with the adapter merged in.
            breaker: whose probes may be judged.
        """
        self.device = pick_device()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        self._model.eval().requires_grad_(False).to(self.device)
        probes = breaker.manifest.probes
        layers = sorted({layer for probe in probes for layer in probe.read_layers})
        blocks = decoder_blocks(self._model)
        self._probed = [blocks[layer] for layer in layers]
        self._reads = [[layers.index(layer) for layer in probe.read_layers] for probe in probes]
        self._weights = [
            (
                torch.tensor(breaker.weights[probe.name].weight_LD, device=self.device),
                breaker.weights[probe.name].bias,
            )
            for probe in probes
        ]

    @property
    def vocabulary_size(self) -> int:
        """Tokens that have an embedding."""
        size: int = self._model.get_input_embeddings().num_embeddings
        return size

    def embed(self, ids: Sequence[int]) -> Tensor:
        """(T, D) input embeddings of tokens."""
        ids_T = torch.tensor(ids, dtype=torch.int64, device=self.device)
        embedded: Tensor = self._model.get_input_embeddings()(ids_T)
        return embedded

    def loss(
        self, prompt_TD: Tensor, answer_A: Sequence[int], policy: Policy | None, *, margin: float
    ) -> AttackLoss:
        """How far the model is from writing `answer_A` with scores `margin` below the thresholds.

        Args:
            prompt_TD: embeddings up to and including the assistant's header.
            policy: None leaves the probes out.
        """
        embed_1TD = torch.cat([prompt_TD, self.embed(answer_A)])[None]
        with record_outputs(self._probed) as outputs:
            # Of a whole vocabulary's logits, those that predict the answer.
            logit_AV = self._model(
                inputs_embeds=embed_1TD, use_cache=False, logits_to_keep=len(answer_A) + 1
            ).logits[0, :-1]
        wanted_A = torch.tensor(answer_A, device=self.device)
        answer = torch.nn.functional.cross_entropy(logit_AV, wanted_A)
        if policy is None:
            return AttackLoss(answer, answer.new_zeros(()))
        return AttackLoss(answer, probe_penalty(self._token_logits(outputs), policy, margin))

    @torch.no_grad()
    def answer(
        self, prompt_TD: Tensor, policy: Policy | None, *, max_new_tokens: int, stop_id: int
    ) -> Answer:
        """The greedy continuation, judged token by token by the state machine that serves.

        It ends with the token that trips, and the last token is scored too.
        """
        num_prompt = len(prompt_TD)
        stream = None if policy is None else StreamBreaker(policy, num_prompt)
        ids: list[int] = []
        embed_TD, cache = prompt_TD, None
        while True:
            with record_outputs(self._probed) as outputs:
                out = self._model(
                    inputs_embeds=embed_TD[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            if stream is not None:
                trip = stream.update(self._token_logits(outputs).cpu().numpy())
                if trip is not None:
                    num_delivered = max(0, trip.token_index - num_prompt)
                    return Answer(tuple(ids[:num_delivered]), True, stream.report().score)
            next_id = int(out.logits[0, -1].argmax())
            if len(ids) == max_new_tokens or next_id == stop_id:
                break
            ids.append(next_id)
            embed_TD, cache = self.embed([next_id]), out.past_key_values
        return Answer(tuple(ids), False, None if stream is None else stream.report().score)

    def _token_logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """(T, K) logit of every token that was just run, under each probe."""
        columns = []
        for reads, (weight_LD, bias) in zip(self._reads, self._weights, strict=True):
            logit_T = torch.full_like(outputs[reads[0]][0, :, 0], bias)
            for at, weight_D in zip(reads, weight_LD, strict=True):
                logit_T = logit_T + outputs[at][0] @ weight_D
            columns.append(logit_T)
        return torch.stack(columns, dim=1)


def probe_penalty(logit_TK: Tensor, policy: Policy, margin: float) -> Tensor:
    """Mean of relu(score - threshold + margin) over the judged scores that are too high.

    The mean is over these alone, so that one token that trips weighs the same in a long stream as
    in a short one. Under a max aggregation each score is the highest logit so far, and the gradient
    falls on that token.
    """
    hinge_S = torch.cat(
        [
            torch.relu(
                running_scores(logit_TK[:, k], probe.aggregation) - probe.threshold_logit + margin
            )
            for k, probe in enumerate(policy.probes)
        ]
    )
    return hinge_S.sum() / (hinge_S > 0).sum().clamp(min=1)


def running_scores(logit_T: Tensor, spec: Aggregation) -> Tensor:
    """Running score (S,) after each token that is not skipped; gradients pass.

    guard/aggregation.py has the same in numpy: a maximum, or weighted means of what came before.
    """
    counted_S = logit_T[spec.skip_tokens :]
    if spec.kind == "max":
        return torch.cummax(counted_S, dim=0).values if len(counted_S) else counted_S
    now_S = torch.arange(len(counted_S), device=logit_T.device)
    age_SS = now_S[:, None] - now_S[None, :]
    if spec.kind == "rolling_mean":
        assert spec.window is not None
        inside_SS = ((age_SS >= 0) & (age_SS < spec.window)).to(logit_T.dtype)
        return inside_SS @ counted_S / inside_SS.sum(dim=1)
    assert spec.alpha is not None
    weight_SS = torch.where(age_SS >= 0, (1 - spec.alpha) ** age_SS.clamp(min=0), 0.0)
    # The first token starts the mean with all its weight; later ones enter with alpha.
    share_S = torch.full_like(counted_S, spec.alpha)
    share_S[:1] = 1.0
    return weight_SS.to(logit_T.dtype) @ (share_S * counted_S)
