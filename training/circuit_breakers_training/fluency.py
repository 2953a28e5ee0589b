"""What the adapter does to the model's text: perplexity of given text, and text of its own.

Both are measured by the same function on the base and on the merged checkpoint, each in the dtype
that is served.

B conversations, T tokens, V vocabulary
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from circuit_breakers.hardware import pick_device, quick_dtype
from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.render import Rendered, TemplateSource, load_tokenizer

__all__ = ["LanguageModel", "Loss", "perplexities", "perplexity"]

_TOKENS_PER_BATCH = 1024
"""Logits of a vocabulary of 50,000 take 200 MB in float32."""


class Loss(NamedTuple):
    """Negative log-likelihood of one response."""

    nats: float
    num_tokens: int


class LanguageModel:
    """A checkpoint that judges and writes text."""

    def __init__(self, model_dir: Path, chat_template: TemplateSource = "model") -> None:
        """Loads it.

        Args:
            chat_template: for those who render conversations with its tokenizer.
        """
        self.tokenizer: Any = load_tokenizer(model_dir, chat_template)
        self._device = pick_device()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=quick_dtype(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        self._model.eval().to(self._device)

    @torch.inference_mode()
    def losses(
        self, rows: Sequence[Rendered], *, progress: Callable[[int], None] = lambda _: None
    ) -> list[Loss]:
        """Loss of the response of each row, given its prompt."""
        result: list[Loss] = [Loss(0.0, 0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        while order:
            width = len(rows[order[-1]].ids)
            size = max(1, _TOKENS_PER_BATCH // width)
            batch, order = order[-size:], order[:-size]
            padded = pad_rows([rows[i] for i in batch], ["response"] * len(batch))
            ids_BT = padded.ids_BT.to(self._device)
            # The first response token is predicted at the last prompt token. Logits before the
            # first such place in the batch would be most of the work, and are of no use.
            first = min(rows[i].num_prompt_tokens for i in batch)
            num_kept = min(max(ids_BT.shape[1] - first, 1), ids_BT.shape[1] - 1)
            target_BT = ids_BT[:, -num_kept:]
            mask_BT = padded.mask_BT[:, -num_kept:].to(self._device)
            logit_BTV = self._model(
                input_ids=ids_BT, use_cache=False, logits_to_keep=num_kept + 1
            ).logits[:, :-1]
            nats_BT = torch.nn.functional.cross_entropy(
                logit_BTV.transpose(1, 2).float(), target_BT, reduction="none"
            )
            for b, index in enumerate(batch):
                nats = nats_BT[b][mask_BT[b]].double().sum().item()
                result[index] = Loss(nats, int(mask_BT[b].sum()))
            progress(len(batch))
        return result

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (V,) of the token after `ids`, float32."""
        ids_BT = torch.tensor([list(ids)], device=self._device)
        logit_BTV = self._model(input_ids=ids_BT, use_cache=False, logits_to_keep=1).logits
        return logit_BTV[0, -1].float().cpu()

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, as text without special tokens."""
        width = max(map(len, prompts))
        # On the left, so that all prompts end, and go on, at the same place.
        ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        pad_id = self.tokenizer.pad_token_id
        written_BT = self._model.generate(
            input_ids=ids_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id if pad_id is None else pad_id,
        )[:, width:]
        return [
            self.tokenizer.decode(written_T.tolist(), skip_special_tokens=True)
            for written_T in written_BT.cpu()
        ]


def perplexity(losses: Sequence[Loss]) -> float:
    """Of all responses together: exp of the mean loss of a token."""
    return math.exp(math.fsum(of.nats for of in losses) / sum(of.num_tokens for of in losses))


def perplexities(losses: Sequence[Loss], strata: Sequence[str]) -> dict[str, float]:
    """Perplexity of all responses of each stratum."""
    by_stratum: dict[str, list[Loss]] = defaultdict(list)
    for loss, stratum in zip(losses, strata, strict=True):
        by_stratum[stratum].append(loss)
    return {name: perplexity(of) for name, of in sorted(by_stratum.items())}
