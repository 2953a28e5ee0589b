"""Training loops that can stand side by side: ours, and the published one.

The published one is written from arXiv 2406.04313, Algorithm 1, and from what its authors' code
does: four forward passes of the whole model, one a kind and a stream, with every hidden state and
all logits, on padded rows.

B rows, T tokens, C counted tokens, D model width
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from circuit_breakers_training.adapter.batch_losses import batch_losses, count_tokens
from circuit_breakers_training.adapter.lora import add_adapter
from circuit_breakers_training.adapter.objective import (
    coefficients,
    cosines,
    retain_errors_absolute,
    retain_errors_relative,
)
from circuit_breakers_training.adapter.streams import ALL_SHORTCUTS, Shortcuts, Streams
from circuit_breakers_training.batches import pad_rows
from circuit_breakers_training.bench.rows import BenchRows
from circuit_breakers_training.blocks import cut_blocks, decoder_blocks
from circuit_breakers_training.recipes.config import Recipe, Tokens
from circuit_breakers_training.render import Rendered

__all__ = ["Loop", "LossValues", "OurLoop", "PublishedLoop", "PublishedOptions", "StepTime"]


class LossValues(NamedTuple):
    loss: float
    retain_loss: float
    reroute_loss: float


class StepTime(NamedTuple):
    wall_s: float
    cpu_s: float
    """Of all threads; what else runs on the machine hardly changes it."""


class Loop(ABC):
    """Something that trains an adapter step by step."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self._optimizer: torch.optim.AdamW | None = None

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's, by PEFT's names."""

    @abstractmethod
    def backward(self, rows: BenchRows, step: int) -> LossValues:
        """Add the gradients of one step's loss to the parameters'."""

    def step(self, rows: BenchRows, step: int) -> StepTime:
        """One optimiser step, timed."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                self.parameters.values(), lr=self.recipe.learning_rate, weight_decay=0.0
            )
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        self._optimizer.zero_grad()
        self.backward(rows, step)
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.max_grad_norm)
        self._optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return StepTime(time.perf_counter() - began_s, time.process_time() - began_cpu_s)


class OurLoop(Loop):
    """The trainer's step."""

    def __init__(
        self,
        recipe: Recipe,
        model_dir: Path,
        device: torch.device,
        shortcuts: Shortcuts = ALL_SHORTCUTS,
    ) -> None:
        super().__init__(recipe, device)
        self.streams = Streams(recipe, model_dir, device, shortcuts=shortcuts)
        self.streams.set_dropout(True)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.streams.parameters

    def backward(self, rows: BenchRows, step: int) -> LossValues:
        totals = count_tokens(self.recipe, rows.retain, rows.harmful)
        size = self.recipe.micro_batch_size or max(len(rows.retain), len(rows.harmful))
        sums = torch.zeros(3, device=self.device)
        for i in range(0, max(len(rows.retain), len(rows.harmful)), size):
            part = slice(i, i + size)
            losses = batch_losses(
                self.recipe,
                self.streams,
                rows.retain[part],
                rows.harmful[part],
                step,
                totals=totals,
            )
            losses.loss.backward()
            sums += torch.stack(losses[:3]).detach()
        return LossValues(*sums.tolist())


@dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """How the published loop is run, where its authors' code or the machine leaves a choice."""

    attention: str = "sdpa"
    """transformers' default."""
    checkpointing: bool = True
    """As published."""
    cut: bool = False
    """Blocks above the one after the deepest target are dropped."""


class PublishedLoop(Loop):
    """Four forward passes a step: float32 weights, under autocast in precision bf16."""

    def __init__(
        self,
        recipe: Recipe,
        model_dir: Path,
        device: torch.device,
        options: PublishedOptions | None = None,
    ) -> None:
        super().__init__(recipe, device)
        options = options or PublishedOptions()
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=torch.float32,
            attn_implementation=options.attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        ).to(device)
        num_blocks = len(decoder_blocks(model))
        self.targets = recipe.target_layers(num_blocks)
        layers = recipe.adapted_layers(num_blocks)
        self._retained = self.targets
        if recipe.objective.retain_layers == "all":
            self._retained = tuple(range(self.targets[-1] + 1))
        if options.cut:
            # The last hidden state of a model comes after its final norm.
            cut_blocks(model, self.targets[-1] + 2)
        self._peft = add_adapter(model, recipe, layers)
        if options.checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        # The base's own dropout stays off, so that losses can be compared.
        self._peft.eval()
        for block in decoder_blocks(model):
            block.training = options.checkpointing
        for module in self._peft.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._peft.named_parameters() if p.requires_grad}

    def backward(self, rows: BenchRows, step: int) -> LossValues:
        objective = self.recipe.objective
        kept_BT, kept_mask_BT = self._padded(rows.retain, objective.retain_tokens)
        bent_BT, bent_mask_BT = self._padded(rows.harmful, objective.reroute_tokens)
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.recipe.precision == "bf16":
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast:
            with torch.no_grad(), self._peft.disable_adapter():
                kept_base = self._hidden_states(kept_BT, rows.retain)
                bent_base = self._hidden_states(bent_BT, rows.harmful)
            kept = self._hidden_states(kept_BT, rows.retain)
            bent = self._hidden_states(bent_BT, rows.harmful)
        retain_loss = torch.stack(
            [
                self._retain_errors(
                    kept[layer + 1][kept_mask_BT], kept_base[layer + 1][kept_mask_BT]
                ).mean()
                for layer in self._retained
            ]
        ).mean()
        reroute_loss = torch.stack(
            [
                cosines(bent[layer + 1][bent_mask_BT], bent_base[layer + 1][bent_mask_BT])
                .relu()
                .mean()
                for layer in self.targets
            ]
        ).mean()
        scale = coefficients(step, self.recipe.steps, objective.alpha)
        loss = scale.retain * objective.retain_weight * retain_loss + scale.reroute * reroute_loss
        loss.backward()
        return LossValues(loss.item(), retain_loss.item(), reroute_loss.item())

    def _padded(self, rows: Sequence[Rendered], tokens: Tokens) -> tuple[Tensor, Tensor]:
        padded = pad_rows(rows, [tokens] * len(rows))
        return padded.ids_BT.to(self.device), padded.mask_BT.to(self.device)

    def _hidden_states(self, ids_BT: Tensor, rows: Sequence[Rendered]) -> tuple[Tensor, ...]:
        length_B1 = torch.tensor([[len(row.ids)] for row in rows], device=self.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < length_B1
        out = self._peft(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            output_hidden_states=True,
            use_cache=False,
        )
        states: tuple[Tensor, ...] = out.hidden_states
        return states

    def _retain_errors(self, adapted_CD: Tensor, base_CD: Tensor) -> Tensor:
        objective = self.recipe.objective
        if objective.retain == "absolute":
            return retain_errors_absolute(adapted_CD, base_CD)
        return retain_errors_relative(adapted_CD, base_CD, smoothing=objective.retain_smoothing)
